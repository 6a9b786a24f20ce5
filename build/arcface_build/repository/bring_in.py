"""Imports a source and installs it in the model repository, for `arcface import` and a first `arcface serve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcface_build.imports.from_source import Imported, import_source
from arcface_build.repository.assemble import assemble
from arcface_clients.evidence.drift import DRIFT_LIMITS


@dataclass(frozen=True)
class BroughtIn:
    """The import, and the versions installed: model name → version."""

    imported: Imported
    installed: dict[str, int]


def bring_in(
    source: str,
    models_dir: Path,
    repository: Path | None,
    versions_kept: int,
    limits: Mapping[str, float] = DRIFT_LIMITS,
    **options: Any,
) -> BroughtIn:
    """Import a source (`options` as for `import_source`) and install it; without a repository only import it.

    `limits`: largest drift by precision; the proof of the import applies that of fp32.

    Raises:
        Missing, WrongUse, SourceRefused, ProofFailed: nothing was installed.
    """
    imported = import_source(source, models_dir, limits=limits, **options)
    if repository is None:
        return BroughtIn(imported, {})
    return BroughtIn(imported, assemble(imported.folder, repository, keep=versions_kept, limits=limits))
