"""Resolves what the user named (a file, known model, InsightFace pack or demo) to an ONNX file and its facts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arcface_build.errors import LicenceNotAccepted, SourceRefused
from arcface_build.imports.demo import ARCHITECTURES, build_demo, recipe
from arcface_build.imports.iresnet import iresnet
from arcface_build.imports.onnx_file import external_files
from arcface_build.imports.pack import find_recognition, recognition_in, unzipped
from arcface_build.imports.tensors import CHECKPOINTS, read_tensors
from arcface_build.shipped import config_table
from arcface_clients.atomic import new_file
from arcface_clients.contract import Preprocessing
from arcface_clients.errors import Missing, WrongUse

DEMOS = {"demo": "mobile", **{f"demo-{arch}": arch for arch in ARCHITECTURES}}
Say = Callable[[str], None]
CACHE = Path("~/.cache/arcface-triton")  # for downloads, unless configured otherwise (storage.cache)


@dataclass(frozen=True)
class Source:
    """An ONNX file and what is known about it without reading its graph."""

    path: Path
    name: str
    kind: str  # file, known, pack, demo, checkpoint
    sha256: str
    licence: str
    url: str = ""
    preprocessing: Preprocessing | None = None
    note: str = ""
    checkpoint: Path | None = None  # what `with_file` makes the file from
    recipe: str = ""  # of a demo: what it is made from; there is no sha256 until `with_file` has made it


@dataclass(frozen=True)
class KnownModels:
    """The content of config/models.yaml."""

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    packs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def by_digest(self, sha256: str) -> tuple[str, dict[str, Any]] | None:
        """(name, entry) of the model with this digest."""
        return next(((name, entry) for name, entry in self.models.items() if entry.get("sha256") == sha256), None)


def known_models(path: Path | None = None) -> KnownModels:
    """Read config/models.yaml: the given path, else in this folder or above it, else the shipped one.

    Raises:
        WrongUse: the file is not valid.
    """
    import yaml

    path = path or config_table("models.yaml")
    try:
        data = yaml.safe_load(path.read_text()) or {}
        known = KnownModels(dict(data.get("models") or {}), dict(data.get("packs") or {}))
        for entry in known.models.values():
            Preprocessing.from_json(entry["preprocessing"])
            if len(entry["sha256"]) != 64:
                raise ValueError(f"sha256 {entry['sha256']!r} is not 64 hex digits")
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as exc:
        raise WrongUse(f"{path} cannot be used: {exc!r}. Compare it with the one in the repository.") from exc
    return known


def resolve(
    text: str,
    workspace: Path,
    *,
    known: KnownModels,
    cache: Path = CACHE,
    accept_licence: bool = False,
    insightface_root: Path | None = None,
    say: Say = lambda line: None,
) -> Source:
    """Find the file that `text` names. Downloads go to `cache`, packs to InsightFace's; demos are built by `with_file`.

    Raises:
        Missing: no such file, or a download failed.
        WrongUse: no such name; LicenceNotAccepted if `--accept-license` is needed first.
        SourceRefused: a download is not the file in config/models.yaml, or a pack has no recognition model.
    """
    path = Path(text).expanduser()
    if path.is_file() and path.suffix.lower() in CHECKPOINTS:
        made = workspace / f"{path.stem}.onnx"
        return Source(made, path.stem, "checkpoint", file_digest(path), "unknown", checkpoint=path)
    if path.is_file():
        return _from_file(unzipped(path, workspace), known)
    if path.is_dir() and text not in (*DEMOS, *known.packs, *known.models):
        return _from_file(recognition_in(path), known)
    if text in DEMOS:
        return _from_demo(DEMOS[text], workspace)
    if text in known.packs:
        entry = known.packs[text]
        path = find_recognition(text, entry, insightface_root, accept_licence, say, workspace)
        return Source(
            path, text, "pack", file_digest(path), entry["licence"], entry["url"], note=f"{path.name} of {text}"
        )
    if text in known.models:
        entry = known.models[text]
        return _known(_fetch(text, entry, cache, accept_licence, say), text, entry)
    if path.suffix == ".onnx" or len(path.parts) > 1:
        raise Missing(
            f"{text} does not exist: expected an ONNX file. See what else can be imported: arcface import --help"
        )
    names = ", ".join([*DEMOS, *known.models, *known.packs])
    raise WrongUse(f"no file and no known model {text!r}: expected an ONNX file or one of {names}.")


def with_file(source: Source, progress: Callable[[int, int], None] | None = None) -> Source:
    """The source with its file and digest: builds a demo, or the network of a checkpoint."""
    if source.checkpoint:
        model, note = iresnet(read_tensors(source.checkpoint), source.checkpoint.name)
        source.path.write_bytes(model.SerializeToString(deterministic=True))
        return replace(source, note=note)
    if not source.recipe:
        return source
    model = build_demo(source.name.removeprefix("demo-"), progress=progress)
    source.path.write_bytes(model.SerializeToString(deterministic=True))
    return replace(source, sha256=file_digest(source.path))


def file_digest(path: Path) -> str:
    """Sha256 of an ONNX file, including any weights in files beside it, in order of their names."""
    digest = hashlib.sha256()
    parts = [path]
    try:
        parts += external_files(path)
    except Exception:  # not ONNX: the error is reported when the file is read
        parts = [path]
    for part in parts:
        if part.is_file():
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _from_file(path: Path, known: KnownModels) -> Source:
    sha256 = file_digest(path)
    match = known.by_digest(sha256)
    if match:
        return _known(path, *match)
    return Source(path, path.stem, "file", sha256, "unknown")


def _known(path: Path, name: str, entry: dict[str, Any]) -> Source:
    return Source(
        path,
        name,
        "known",
        entry["sha256"],
        entry.get("licence", "unknown"),
        entry.get("url", ""),
        Preprocessing.from_json(entry["preprocessing"]),
        note=f"known file: {name} in config/models.yaml",
    )


def _from_demo(arch: str, workspace: Path) -> Source:
    return Source(
        workspace / f"demo-{arch}.onnx",
        f"demo-{arch}",
        "demo",
        "",
        "Apache-2.0",
        preprocessing=Preprocessing(),
        note="DEMO: seeded random weights, NOT FOR RECOGNITION",
        recipe=recipe(arch),
    )


def _fetch(name: str, entry: dict[str, Any], cache: Path, accept_licence: bool, say: Say) -> Path:
    """A known model from the cache or, once its licence is accepted, from its URL; verified by digest."""
    import urllib.error
    import urllib.request

    target = cache.expanduser() / f"{name}.onnx"
    if target.is_file() and file_digest(target) == entry["sha256"]:
        return target
    address = entry.get("download", "")
    by_hand = f"Put it there by hand: {target} (sha256 {entry['sha256'][:8]}…)"
    if not address:
        raise Missing(f"{name} is not in {target.parent} and cannot be downloaded. {by_hand}.")
    if not accept_licence:
        raise LicenceNotAccepted(
            f"{name} ({entry.get('licence', 'licence unknown')}) would be downloaded from {address}: "
            f"expected --accept-license first. Next: arcface import {name} --accept-license"
        )
    say(f"downloading {address}")
    with new_file(target) as temporary:
        try:
            with urllib.request.urlopen(address, timeout=30) as answer, temporary.open("wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
        except (urllib.error.URLError, OSError) as exc:
            raise Missing(f"{name} cannot be downloaded from {address}: {exc}. {by_hand}.") from exc
        got = file_digest(temporary)
        if got != entry["sha256"]:
            raise SourceRefused(
                f"{address} returned a different file: expected sha256 {entry['sha256'][:12]}…, got "
                f"{got[:12]}…. {by_hand}."
            )
    return target
