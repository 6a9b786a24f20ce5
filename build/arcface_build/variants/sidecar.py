"""A variant on disk: files in models/NAME/variants/, written atomically.

    variants/int8-cpu.onnx            passed its gate; `file` in the sidecar is its path relative to the model folder
    variants/int8-cpu.json            sidecar: contract id, recipe, calibration, gates, sha256
    variants/int8-cpu.search.png      drift against layers kept, if there was a search
    variants/int8-cpu.onnx.refused    failed its gate, with .json.refused beside it; never served

A bf16 variant is the serving ONNX itself, computed in bf16 by OpenVINO: it has only a sidecar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.imports.importing import tool_versions
from arcface_build.imports.source import file_digest
from arcface_build.variants.gate import VariantVerdict
from arcface_build.variants.recipe import Recipe
from arcface_clients.atomic import new_file, write_json
from arcface_clients.engines.import_manifest import ImportManifest
from arcface_clients.errors import WrongUse

if TYPE_CHECKING:
    import onnx

FORMAT = 1


def variants_folder(model_dir: Path) -> Path:
    """The folder with a model's variants."""
    return model_dir / "variants"


def read_sidecar(model_dir: Path, precision: str, target: str) -> dict[str, Any] | None:
    """The sidecar of a variant that passed, None if there is none.

    Raises:
        WrongUse: it is not JSON of this format, or names a serving ONNX that has been replaced since.
    """
    path = variants_folder(model_dir) / f"{precision}-{target}.json"
    if not path.is_file():
        return None
    again = f"Make it again: arcface quantize {model_dir.name} --precision {precision} --target {target}"
    try:
        sidecar = json.loads(path.read_text())
    except ValueError as exc:
        raise WrongUse(f"{path} is not JSON ({exc}). {again}") from exc
    if not isinstance(sidecar, dict) or sidecar.get("format") != FORMAT:
        raise WrongUse(f"{path} is not a sidecar of format {FORMAT}. {again}")
    file = model_dir / sidecar["file"]
    if not file.is_file():
        raise WrongUse(f"{path} names {sidecar['file']}, which is gone. {again}")
    return sidecar


def set_aside(model_dir: Path, sidecar: dict[str, Any]) -> Path:
    """Rename a variant and its sidecar to .refused; returns the sidecar's new path.

    The model is renamed first: a kill in between leaves a sidecar that names a missing file, which every reader
    refuses, and never a model without the sidecar that condemns it.
    """
    folder, name = variants_folder(model_dir), f"{sidecar['precision']}-{sidecar['target']}"
    refused = {**sidecar, "passed": False}
    if sidecar["recipe"] is not None:  # bf16 has no separate file
        refused["file"] = f"{sidecar['file']}.refused"
        (model_dir / sidecar["file"]).replace(model_dir / refused["file"])
    path = folder / f"{name}.json.refused"
    write_json(path, refused)
    (folder / f"{name}.json").unlink()
    return path


def write_variant(
    model_dir: Path,
    manifest: ImportManifest,
    precision: str,
    target: str,
    model: onnx.ModelProto | None,
    recipe: Recipe | None,
    verdicts: Sequence[VariantVerdict],
    told: Mapping[str, Any],
) -> tuple[dict[str, Any], Path]:
    """Write model and sidecar, as .refused if the first verdict (for its main runtime) is a refusal.

    Args:
        model_dir: models/NAME/.
        manifest: of that folder.
        precision, target: name the variant.
        model: the typed ONNX; None for bf16.
        recipe: how it was made; None for bf16.
        verdicts: one per runtime.
        told: further entries of the sidecar: faces, margin, warnings.

    Returns:
        The sidecar and its path.
    """
    folder, name = variants_folder(model_dir), f"{precision}-{target}"
    passed = verdicts[0].passed
    suffix = "" if passed else ".refused"
    path = folder / f"{name}.json{suffix}"
    file, digest = manifest.serving["file"], manifest.serving["sha256"]
    if model is not None:
        file = f"variants/{name}.onnx{suffix}"
        path.unlink(missing_ok=True)  # never a sidecar beside a file it does not belong to
        with new_file(model_dir / file) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        digest = file_digest(model_dir / file)
    sidecar = {
        "format": FORMAT,
        "name": manifest.name,
        "precision": precision,
        "target": target,
        "file": file,
        "sha256": digest,
        "serving_sha256": manifest.serving["sha256"],
        "contract_id": manifest.contract_id,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "passed": passed,
        "gates": [verdict.to_json() for verdict in verdicts],
        **told,
        "recipe": recipe.to_json() if recipe else None,
        "tools": tool_versions(),
    }
    write_json(path, sidecar)
    if passed:
        for stale in (folder / f"{name}.onnx.refused", folder / f"{name}.json.refused"):
            stale.unlink(missing_ok=True)
    return sidecar, path
