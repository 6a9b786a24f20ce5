"""Mends a model repository that a killed command left half done: temporary files, and overlays of another version.

A version appears by one rename and its overlays follow. Each overlay pins the version that it describes, so a kill in
between leaves a server that is served as before, or refuses to start, but never new weights under an old contract id.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from arcface_build.repository.lock import locked
from arcface_build.repository.versions import LEAVES, stale_overlays, write_overlays
from arcface_clients.atomic import discard, leftovers
from arcface_clients.errors import Missing


def faults(repository: Path) -> list[str]:
    """What a killed command left, one sentence each; empty where all is well."""
    found = [f"{path} was left by a command that was killed" for path in _leftovers(repository)]
    with contextlib.suppress(Missing):  # a manifest that cannot be read is named by whoever needs it
        found += [
            f"{overlay} does not describe the version that is to be served" for overlay in stale_overlays(repository)
        ]
    return found


def mend(repository: Path) -> list[str]:
    """Do away with all faults; returns what they were."""
    if not faults(repository):
        return []
    with locked(repository):
        found = faults(repository)
        for path in _leftovers(repository):
            discard(path)
        with contextlib.suppress(Missing):
            write_overlays(repository)
    return found


def _leftovers(repository: Path) -> list[Path]:
    """What dead writers left in the leaf models, their configs and their versions."""
    found = []
    for name in LEAVES:
        model = repository / name
        for folder in (model, model / "configs", *(p for p in model.glob("*") if p.name.isdecimal())):
            found += leftovers(folder)
    return found
