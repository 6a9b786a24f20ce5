"""Lays the hand-written files of model_repository/ where there are none, and keeps them at the installed version.

A folder made here remembers in a hidden file which version wrote which file. A later version replaces a file that is
still as it was written and leaves one that somebody edited; weights, overlays and tuned settings are never touched.
A folder without that memory, such as a checkout's, belongs to somebody else, and so do its files. Only the copies of a
model's code in its later versions, which are ours, follow the code in version 1: git does not know them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcface_build.repository.lock import locked
from arcface_build.repository.overlays import write_overlays
from arcface_build.repository.versions import LEAVES
from arcface_build.shipped import shipped
from arcface_clients.atomic import copy_file, new_folder, remove, write_json
from arcface_clients.errors import Missing, WrongUse

MEMORY = ".hand_written.json"


@dataclass(frozen=True)
class Followed:
    """Paths within the repository that now are those of this version, and edited ones that were left alone."""

    updated: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()


def hand_written(repository: Path) -> list[str]:
    """The files of a model repository that people write, as sorted relative paths; the build writes all others."""
    found = {path for name in ("config.pbtxt", "1/*.py", "1/.gitkeep") for path in repository.glob(f"*/{name}")}
    for overlay in repository.glob("*/configs/*.pbtxt"):
        if overlay.parent.parent.name not in LEAVES and overlay.name != "tuned.pbtxt":
            found.add(overlay)
    return sorted(path.relative_to(repository).as_posix() for path in found)


def lay_out(folder: Path, source: Path | None = None) -> Path:
    """Make the model repository `folder`, without weights, whole or not at all.

    Args:
        folder: absent or empty.
        source: the model repository to copy; None takes the one that came with this code.

    Raises:
        WrongUse: there is something in `folder`.
    """
    source = source or shipped("model_repository")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WrongUse(f"{folder} is neither a model repository of ours nor empty. Name another: --model-repository")
    if folder.exists():  # perhaps where a volume is mounted, which cannot be replaced
        _copy(source, folder)
        return folder
    with new_folder(folder) as temporary:
        _copy(source, temporary)
    return folder


def _copy(source: Path, target: Path) -> None:
    """Copy the files; arcface/config.pbtxt, by which a repository is known, comes last."""
    for name in sorted(hand_written(source), key=lambda name: name == "arcface/config.pbtxt"):
        if name == "arcface/config.pbtxt":
            _remember(target, _digests(source))
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def follow(repository: Path, source: Path | None = None) -> Followed:
    """Bring a repository that `lay_out` made to this version; of another one only the code of models' later versions.

    Python files of models are copied into each version folder, and followed there too. A file that is gone comes back.

    Raises:
        Missing: the memory cannot be read.
    """
    source = source or shipped("model_repository")
    if not os.access(repository, os.W_OK):
        return Followed()
    if not (repository / MEMORY).is_file():
        return Followed(tuple(_copied_from_first(repository)))
    wanted, before = _digests(source), _memory(repository)
    if before == wanted and all((repository / name).is_file() for name in wanted):
        return Followed()
    updated, edited = [], []
    with locked(repository):
        remembered = dict(wanted)
        for name, digest in wanted.items():
            for target in _places(repository, name):
                have = _digest(target)
                if have in (None, before.get(name)) and have != digest:
                    copy_file(source / name, target)
                    updated.append(target.relative_to(repository).as_posix())
                elif have != digest and before.get(name) != digest:
                    edited.append(target.relative_to(repository).as_posix())
                    remembered[name] = before.get(name, "")  # asked again until it is settled
        for name in sorted(before.keys() - wanted.keys()):
            if _digest(repository / name) == before[name]:
                remove(repository / name)
                updated.append(name)
                for folder in (repository / name).parents[: name.count("/")]:
                    with contextlib.suppress(OSError):  # there is something else in it
                        folder.rmdir()
        _remember(repository, remembered)
        write_overlays(repository)  # they hold a copy of config.pbtxt
    return Followed(tuple(updated), tuple(edited))


def _copied_from_first(repository: Path) -> list[str]:
    """Bring a model's code in its later versions to that of version 1; returns the paths that were written."""
    copied = []
    for name in hand_written(repository):
        first, *later = _places(repository, name)
        for target in (target for target in later if _digest(target) != _digest(first)):
            copy_file(first, target)
            copied.append(target.relative_to(repository).as_posix())
    return copied


def _places(repository: Path, name: str) -> list[Path]:
    """Where a file belongs: a model's code in each of its versions, every other file in one place."""
    path = repository / name
    if path.suffix != ".py":
        return [path]
    later = (folder for folder in path.parent.parent.glob("[0-9]*") if folder.name != "1")
    return [path, *(folder / path.name for folder in sorted(later) if any(folder.glob("*.py")))]


def _digests(repository: Path) -> dict[str, str]:
    return {name: _digest(repository / name) or "" for name in hand_written(repository)}


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _remember(repository: Path, digests: Mapping[str, str]) -> None:
    from arcface_clients import __version__

    write_json(repository / MEMORY, {"version": __version__, "sha256": dict(sorted(digests.items()))})


def _memory(repository: Path) -> dict[str, str]:
    path = repository / MEMORY
    try:
        data: Any = json.loads(path.read_text())["sha256"]
        return {str(name): str(digest) for name, digest in data.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Missing(
            f"{path} cannot be read ({exc}): expected which version wrote which file. "
            "Next: delete it, and the hand-written files stay as they are"
        ) from exc
