"""Whether a version in the model repository still is what its manifest says: its files, its manifest, its contract.

Triton loads whatever lies in a version folder. So `install` records the digests, and every command that serves a
version, goes back to it or takes it for installed asks here first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arcface_clients.engines.onnx_contract import contract_in
from arcface_clients.errors import GateFailed
from arcface_clients.plans.manifest import file_sha256

FILES, PLANS, SEAL = "files", "plans", "seal"  # keys of a version's manifest.json
PHOTO_MODEL = "photo_faces"  # holds a detector
# Remarks, which do not make another version: by which command `serve` leaves it as it is, and why it was chosen.
HELD, CHOICE = "held", "choice"
BY_ROLLBACK, BY_ASSEMBLE = "rollback", "assemble"  # formerly true: by a rollback


def sealed(manifest: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """The manifest with the digests of these files and of itself; those of plans stand in it already."""
    digests = {name: file_sha256(path) for name, path in files.items() if ".plan" not in name}
    told = {**manifest, FILES: digests}
    return {**told, SEAL: _seal(told)}


def check_version(version: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a version folder that does not hold what its manifest says.

    One that was installed before digests were recorded is only asked for the contract that its ONNX names.

    Args:
        version: the folder.
        manifest: its manifest.json.

    Raises:
        GateFailed: a file or the manifest was changed or exchanged since it was installed.
    """
    if SEAL in manifest and manifest[SEAL] != _seal(manifest):
        raise _refusal(version, "its manifest.json was edited")
    digests = _digests(manifest)
    for name, digest in digests.items():
        if not (version / name).is_file():
            raise _refusal(version, f"{name} is gone")
        if (got := file_sha256(version / name)) != digest:
            raise _refusal(version, f"{name} was changed: expected sha256 {digest[:12]}…, got {got[:12]}…")
    for added in (path for path in weights_in(version) if digests and path.name not in digests):
        raise _refusal(version, f"{added.name} was added")
    for weights in sorted(version.glob("model*.onnx")):
        named = contract_in(weights)
        if named is not None and named != manifest["contract_id"][:32]:
            raise _refusal(
                version,
                f"{weights.name} names contract {named[:12]}…, its manifest.json {manifest['contract_id'][:12]}…",
            )


def weights_in(version: Path) -> list[Path]:
    """Everything in a version folder that Triton could load, and what lies beside a plan."""
    return sorted(path for pattern in ("*.onnx", "*.plan", "*.plan.json") for path in version.glob(pattern))


def _digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """File name → sha256, of everything that was installed."""
    digests = dict(manifest.get(FILES, {}))
    for name, told in manifest.get(PLANS, {}).items():
        digests |= {name: told["sha256"], f"{name}.json": told["manifest_sha256"]}
    return digests


def _seal(manifest: Mapping[str, Any]) -> str:
    told = {key: value for key, value in manifest.items() if key not in (SEAL, HELD, CHOICE)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def how_to_mend(model: str) -> str:
    """The commands that put another version in the place of a damaged one, as a sentence."""
    again = {PHOTO_MODEL: "arcface import-detector FILE", "arcface_trt": "arcface assemble NAME --plan FILE"}
    back = f" --model {model}" if model in again else ""
    command = again.get(model, "arcface assemble NAME (or arcface import SOURCE)")
    return f"Install it again: {command}, or go back: arcface rollback{back}"


def _refusal(version: Path, what: str) -> GateFailed:
    return GateFailed(f"{version} is not what was installed: {what}. {how_to_mend(version.parent.name)}")
