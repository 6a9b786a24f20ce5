"""Reads the versions of a model in the model repository: which there are, which one is served, and what it is.

Weights live in numbered version folders; the highest is served. A version's manifest.json says what it is: contract id,
precision, source.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from arcface_build.repository.integrity import check_version, how_to_mend
from arcface_clients.engines.import_manifest import DEMO
from arcface_clients.errors import Missing

REFERENCE = "arcface_reference"
LEAVES = ("arcface_onnx", "arcface_trt", REFERENCE)  # the models that hold weights


def versions(model: Path) -> list[int]:
    """Version numbers of a model folder that contain a manifest, and therefore weights, ascending."""
    return sorted(int(p.parent.name) for p in model.glob("*/manifest.json") if p.parent.name.isdecimal())


def served_version(repository: Path, model: str = "arcface_onnx") -> int | None:
    """The version to serve: the newest; for the reference, the newest with the contract of the model it verifies.

    None if there are no weights.

    Raises:
        Missing: a manifest cannot be read.
    """
    have = versions(repository / model)
    if model != REFERENCE or len(have) < 2:
        return have[-1] if have else None
    with contextlib.suppress(Missing):  # the code that needs that manifest reports it
        proved = [manifest["contract_id"] for leaf in LEAVES[:2] if (manifest := served_manifest(repository, leaf))]
        fitting = [v for v in have if manifest_of(repository / model / str(v))["contract_id"] in proved[:1]]
        return fitting[-1] if fitting else have[-1]
    return have[-1]


def served_manifest(repository: Path, model: str = "arcface_onnx") -> dict[str, Any] | None:
    """The manifest of the version that Triton would serve, or None if there are no weights.

    Raises:
        Missing: it cannot be read.
    """
    version = served_version(repository, model)
    return None if version is None else manifest_of(repository / model / str(version))


def manifest_of(version: Path) -> dict[str, Any]:
    """The manifest of a version folder.

    Raises:
        Missing: it cannot be read, or is none.
    """
    path, fix = version / "manifest.json", how_to_mend(version.parent.name)
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise Missing(f"{path} cannot be read ({exc}). {fix}") from exc
    expected = {"name", "source", *["contract_id"] * (version.parent.name in LEAVES)}  # a detector has no contract
    lacking = expected - set(data if isinstance(data, dict) else ())
    if lacking:
        raise Missing(f"{path} is not a version's manifest: it lacks {', '.join(sorted(lacking))}. {fix}")
    return data


def serves_demo(repository: Path, model: str) -> bool:
    """Whether the version that is to be served holds random weights, which recognise nobody.

    Raises:
        Missing: its manifest cannot be read.
    """
    manifest = served_manifest(repository, model)
    return manifest is not None and manifest["source"].get("kind") == DEMO


def served_folder(repository: Path, model: str) -> Path:
    """The version folder that Triton would serve.

    Raises:
        Missing: the model has no weights.
    """
    version = served_version(repository, model)
    if version is None:
        raise Missing(f"{model} has no weights in {repository}. Next: arcface import demo, or arcface import YOUR.onnx")
    return repository / model / str(version)


def check_served(repository: Path, model: str) -> None:
    """Refuse the version that Triton would serve if it does not hold what its manifest says; none is no fault.

    Raises:
        GateFailed: it was changed since it was installed.
        Missing: its manifest cannot be read.
    """
    version = served_version(repository, model)
    if version is not None:
        check(repository / model / str(version))


def check(version: Path) -> None:
    """The same for a version folder."""
    check_version(version, manifest_of(version))
