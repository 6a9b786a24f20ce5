"""Repairs a model repository after a command was killed: removes temporary files and rewrites stale overlays.

A version appears in one rename and its overlays follow. Each overlay pins the version that it describes, so after a
kill in between the server serves what it served before, or refuses to start, but never new weights under an old
contract id.
"""

from __future__ import annotations

from pathlib import Path

from arcface_build.repository.integrity import PHOTO_MODEL
from arcface_build.repository.lock import locked
from arcface_build.repository.overlays import stale_overlays, write_overlays
from arcface_build.repository.versions import LEAVES
from arcface_clients.atomic import discard, leftovers


def faults(repository: Path) -> list[str]:
    """What a killed command left behind, one sentence each; empty if there is nothing."""
    found = [f"{path} was left behind by a killed command" for path in _leftovers(repository)]
    return found + [f"{overlay} does not describe the version to be served" for overlay in stale_overlays(repository)]


def mend(repository: Path) -> list[str]:
    """Repair what can be repaired, and return what that was; a version changed by hand is left to `check_served`."""
    if not faults(repository):
        return []
    with locked(repository):
        found = faults(repository)
        for path in _leftovers(repository):
            discard(path)
        write_overlays(repository)
        left = faults(repository)
    return [fault for fault in found if fault not in left]


def _leftovers(repository: Path) -> list[Path]:
    """Temporary files of dead writers in the models with files, their configs and their versions."""
    found = []
    for name in (*LEAVES, PHOTO_MODEL):
        model = repository / name
        for folder in (model, model / "configs", *(p for p in model.glob("*") if p.name.isdecimal())):
            found += leftovers(folder)
    return found
