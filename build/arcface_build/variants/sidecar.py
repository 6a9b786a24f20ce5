"""A variant on disk: files in models/NAME/variants/, written atomically.

    variants/int8-cpu.onnx            passed its gate; `file` in the sidecar is its path relative to the model folder
    variants/int8-cpu.json            sidecar: contract id, recipe, calibration, gates, sha256
    variants/int8-cpu.search.png      drift against layers kept, if there was a search
    variants/int8-cpu.onnx.refused    failed its gate, with .json.refused beside it; never served

`retired` in a sidecar lists what passed once and failed on other faces since: sha256, faces, runtime, why, and
max_drift if nothing but drift was at fault. Whatever is made under that name carries it on, so it is never forgotten.

A bf16 variant is the serving ONNX itself, computed in bf16 by OpenVINO: it has only a sidecar.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.errors import ProofFailed
from arcface_build.imports.importing import tool_versions
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


def set_aside(model_dir: Path, sidecar: dict[str, Any], origin: str, failed: VariantVerdict) -> Path:
    """Rename a variant and its sidecar to .refused; returns the sidecar's new path.

    Args:
        model_dir: models/NAME/.
        sidecar: of the variant.
        origin: the faces on which it failed.
        failed: how.

    The model is renamed first: a kill in between leaves a sidecar that names a missing file, which every reader
    refuses, and never a model without the sidecar that condemns it.
    """
    folder, name = variants_folder(model_dir), f"{sidecar['precision']}-{sidecar['target']}"
    only_drift = failed.why == failed.gate.why
    retired = {"sha256": sidecar["sha256"], "faces": origin, "runtime": failed.runtime, "why": failed.why}
    retired["max_drift"] = failed.max_drift if only_drift else None
    refused = {**sidecar, "passed": False, "retired": [*sidecar.get("retired", ()), retired]}
    if sidecar["recipe"] is not None:  # bf16 has no separate file
        refused["file"] = f"{sidecar['file']}.refused"
        (model_dir / sidecar["file"]).replace(model_dir / refused["file"])
    path = folder / f"{name}.json.refused"
    write_json(path, refused)
    (folder / f"{name}.json").unlink()
    return path


def retired_since(model_dir: Path, installed: Mapping[str, Any]) -> str:
    """Why a variant that was installed is not served any more; empty if it may be.

    A bf16 variant has the file of the serving ONNX: a new try that fails leaves the one that passed what it is.

    Args:
        model_dir: models/NAME/.
        installed: the sidecar that was copied when it was installed.
    """
    passed, refused = _both(model_dir, f"{installed.get('precision')}-{installed.get('target')}")
    digest = installed.get("sha256")
    if not digest or digest == passed.get("sha256"):
        return ""
    for known in (*_retired_in(refused), *_retired_in(passed)):
        if known["sha256"] == digest:
            return f"in {known['runtime']} on {known['faces']}: {known['why']}"
    return "its sidecar is set aside" if digest == refused.get("sha256") else ""


def _both(model_dir: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sidecars of a variant that passed and of one that was refused; empty where none can be read."""
    path = variants_folder(model_dir) / f"{name}.json"
    return _read(path), _read(path.with_name(f"{path.name}.refused"))


def _read(sidecar: Path) -> dict[str, Any]:
    try:
        told = json.loads(sidecar.read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _retired_in(sidecar: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = sidecar.get("retired")
    known = listed if isinstance(listed, list) else []
    return [one for one in known if isinstance(one, dict) and {"sha256", "faces", "runtime", "why"} <= one.keys()]


def _refuse_retired(retired: Sequence[Mapping[str, Any]], digest: str, verdict: VariantVerdict, model: str) -> None:
    """Refuse weights that failed on other faces before: to pass on these does not undo it, more drift allowed may.

    Raises:
        ProofFailed: they did, and the limit of the day would not let them pass there either.
    """
    for known in retired:
        drift = known.get("max_drift")
        if known["sha256"] == digest and not (isinstance(drift, float) and drift <= verdict.gate.limit):
            raise ProofFailed(
                f"these are the weights of {model} that were retired before: they fail in {known['runtime']} on "
                f"{known['faces']} ({known['why']}), whatever they do on other faces. Next: arcface quantize {model} "
                "--eval FOLDER with such faces among them"
            )


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

    Raises:
        ProofFailed: these very weights were retired before; everything stays as it is.
    """
    folder, name = variants_folder(model_dir), f"{precision}-{target}"
    passed = verdicts[0].passed
    suffix = "" if passed else ".refused"
    path = folder / f"{name}.json{suffix}"
    file, digest = manifest.serving["file"], manifest.serving["sha256"]
    serialised = None if model is None else model.SerializeToString(deterministic=True)
    if serialised is not None:
        file, digest = f"variants/{name}.onnx{suffix}", hashlib.sha256(serialised).hexdigest()
    before = _both(model_dir, name)
    retired = list({one["sha256"]: one for sidecar in before for one in _retired_in(sidecar)}.values())
    if passed:
        _refuse_retired(retired, digest, verdicts[0], manifest.name)
    if serialised is not None:
        path.unlink(missing_ok=True)  # never a sidecar beside a file it does not belong to
        with new_file(model_dir / file) as temporary:
            temporary.write_bytes(serialised)
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
        **({"retired": retired} if retired else {}),
        "recipe": recipe.to_json() if recipe else None,
        "tools": tool_versions(),
    }
    write_json(path, sidecar)
    if passed:
        for stale in (folder / f"{name}.onnx.refused", folder / f"{name}.json.refused"):
            stale.unlink(missing_ok=True)
    return sidecar, path
