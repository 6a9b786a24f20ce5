"""Says that a tritonserver goes on answering with the weights it loaded, after others were installed under it.

Models are loaded on request only, so nothing changes for its clients until it is started again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arcface_build.repository.integrity import HELD, PHOTO_MODEL
from arcface_build.repository.versions import LEAVES, served_manifest
from arcface_clients.errors import Missing

_OPTION = "--model-repository="
_WITH_FILES = (*LEAVES, PHOTO_MODEL)


class ChangeOver:
    """What a repository served before a command installed something in it or went back."""

    def __init__(self, repository: Path) -> None:
        """Look at it now."""
        self._repository = repository
        self._before = _served(repository)

    def told(self) -> str:
        """Which servers still answer with the former weights, and how to change over; empty if there is none."""
        now = _served(self._repository)
        changed = [model for model in _WITH_FILES if now.get(model) != self._before.get(model)]
        servers = servers_of(self._repository) if changed else []
        if not servers:
            return ""
        processes = f"process{'es' * (len(servers) > 1)} {', '.join(map(str, servers))}"
        lines = [
            f"tritonserver ({processes}) serves this repository and goes on answering with what it loaded. "
            "To change over: stop it and run arcface serve again"
        ]
        versions = [served[model] for served in (self._before, now) for model in changed if model in served]
        contracts = {version["contract_id"] for version in versions if "contract_id" in version}  # a detector has none
        if len(contracts) > 1:
            lines.append(
                "The new weights are of another contract: clients that are connected then end with ContractMismatch, "
                "and galleries have to be made again"
            )
        return ". ".join(lines)


def servers_of(repository: Path) -> list[int]:
    """Process ids of the tritonservers of this host that were started on this model repository."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            line = (process / "cmdline").read_bytes().split(b"\0")
            named = [os.fsdecode(word)[len(_OPTION) :] for word in line if word.startswith(_OPTION.encode())]
            if not named or not Path(os.fsdecode(line[0])).name.startswith("tritonserver"):
                continue
            folders = [(process / "cwd").readlink() / name for name in named]
            if any(folder.exists() and folder.samefile(repository) for folder in folders):
                found.append(int(process.name))
    return sorted(found)


def _served(repository: Path) -> Mapping[str, Mapping[str, Any]]:
    """Model → manifest of the version that a new server would take; the same weights have the same one."""
    found = {}
    for model in _WITH_FILES:
        with contextlib.suppress(Missing):
            manifest = served_manifest(repository, model)
            if manifest is not None:
                found[model] = {key: value for key, value in manifest.items() if key != HELD}
    return found
