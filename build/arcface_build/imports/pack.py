"""Finds the recognition model of an InsightFace pack by inspecting the graphs of its files."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arcface_build.errors import LicenceNotAccepted, SourceRefused
from arcface_build.imports.flavour import flavour_of
from arcface_build.imports.onnx_file import read_source
from arcface_build.imports.outputs import keep_embedding
from arcface_clients.atomic import new_folder
from arcface_clients.errors import Missing

LARGEST_PACK = 4_000_000_000  # antelopev2 is 400 MB


def insightface_home(given: Path | None = None) -> Path:
    """InsightFace's root: the given one, else INSIGHTFACE_HOME, else ~/.insightface."""
    return (given or Path(os.environ.get("INSIGHTFACE_HOME") or "~/.insightface")).expanduser()


def find_recognition(
    pack: str,
    entry: dict[str, Any],
    root: Path | None,
    accept_licence: bool,
    say: Callable[[str], None],
    workspace: Path,
) -> Path:
    """The recognition file of a pack in InsightFace's cache; if the pack is absent, InsightFace downloads it.

    A pack that is still zipped there is extracted into `workspace`.

    Raises:
        LicenceNotAccepted: a download is needed, and its licence was not accepted.
        Missing: the download failed, or InsightFace is not installed.
        SourceRefused: no file of the pack is a recognition model, or more than one is.
    """
    folder = insightface_home(root) / "models" / pack
    if not any(folder.rglob("*.onnx")):
        zipped = folder.with_name(f"{pack}.zip")
        if zipped.is_file():
            return unzipped(zipped, workspace)
        _download(pack, entry, folder, accept_licence, say)
    return recognition_in(folder)


def unzipped(path: Path, workspace: Path) -> Path:
    """Extract a zipped pack into the workspace and return its recognition model; return any other file as it is.

    Raises:
        SourceRefused: no member is a recognition model, or more than one is; or they are too large.
    """
    if not zipfile.is_zipfile(path):
        return path
    folder = workspace / path.stem
    with zipfile.ZipFile(path) as archive:
        members = [entry for entry in archive.infolist() if entry.filename.endswith(".onnx")]
        if not members:
            return path
        total = sum(entry.file_size for entry in members)
        if total > LARGEST_PACK:
            raise SourceRefused(f"{path.name} contains {total:,} bytes of ONNX: expected at most {LARGEST_PACK:,}.")
        folder.mkdir(parents=True, exist_ok=True)
        for entry in members:  # by file name only: a zip may contain any path
            with archive.open(entry) as packed, (folder / Path(entry.filename).name).open("wb") as file:
                shutil.copyfileobj(packed, file)
    return recognition_in(folder)


def recognition_in(folder: Path) -> Path:
    """The only recognition model in a folder, searched recursively.

    Raises:
        SourceRefused: there is none, or more than one.
    """
    fitting = [path for path in sorted(folder.rglob("*.onnx")) if _is_recognition(path)]
    if len(fitting) != 1:
        have = ", ".join(path.name for path in fitting or sorted(folder.rglob("*.onnx"))) or "no ONNX file"
        raise SourceRefused(
            f"{folder} contains {len(fitting)} recognition models: expected one ({have}). Import the file itself: "
            f"arcface import {folder}/FILE.onnx"
        )
    return fitting[0]


def _is_recognition(path: Path) -> bool:
    """Whether the file passes the checks of an import, whatever its name."""
    try:
        model = read_source(path)
        keep_embedding(model, path.name)
        flavour_of(model, path.name)
    except SourceRefused:
        return False
    return True


def _download(pack: str, entry: dict[str, Any], folder: Path, accept_licence: bool, say: Callable[[str], None]) -> None:
    """Let InsightFace download into a temporary root, and move the complete pack into the cache."""
    by_hand = f"On a machine with a network: fetch {entry['url']} and unzip it to {folder}"
    if not accept_licence:
        raise LicenceNotAccepted(
            f"{pack} is not in {folder}; its weights are licensed for {entry['licence']}: expected --accept-license "
            f"before the download. Next: arcface import {pack} --accept-license"
        )
    try:
        from insightface.utils.storage import download
    except ImportError as exc:
        raise Missing(
            f"{pack} is not in {folder}, and InsightFace cannot be imported to download it: {exc}. {by_hand}."
        ) from exc
    say(f"downloading {pack} with InsightFace")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".arcface-", dir=folder.parent) as root:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints to stdout, which may be our JSON
                got = Path(download("models", pack, root=root))
        except Exception as exc:  # errors of requests, zipfile, RuntimeError: in any case there is no pack
            raise Missing(f"{pack} is not in {folder} and cannot be downloaded: {exc}. {by_hand}.") from exc
        with new_folder(folder) as temporary:
            for path in got.rglob("*"):
                if path.is_file():
                    target = temporary / path.relative_to(got)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)
