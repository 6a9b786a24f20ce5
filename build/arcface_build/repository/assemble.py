"""Into the model repository: what passed its gate, each as a new version of its model, whole or not at all.

models/NAME/ gives arcface_reference (the source as it came) and arcface_onnx (serving ONNX, or the variant chosen for
this CPU); plans with their manifests give arcface_trt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcface_build.errors import ProofFailed
from arcface_build.plans.gpu import gpu_sm
from arcface_build.repository.versions import install, served_folder, served_manifest
from arcface_clients.errors import Missing, PlanRefused
from arcface_clients.evidence.gate import judge_record, judge_sidecar

if TYPE_CHECKING:
    from arcface_build.variants.choose import Choice

KEPT_VERSIONS = 3


def assemble(
    model_dir: Path,
    repository: Path,
    variant: Choice | None = None,
    keep: int = KEPT_VERSIONS,
    limits: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Install an imported model; `variant` is what arcface_onnx serves instead of the fp32 serving ONNX.

    Args:
        model_dir: models/NAME.
        repository: the model repository.
        variant: a choice of `arcface_build.variants.choose.choose`, whose gates were passed.
        keep: versions that stay for a rollback.
        limits: largest drift by precision; None takes comparison.max_drift of the configuration.

    Returns:
        Model name → version number that now serves these weights.

    Raises:
        Missing: the folder holds no imported model.
        ProofFailed: the variant's sidecar does not show that it passes its gate in the chosen runtime.
    """
    imported = _imported(model_dir)
    manifest = dict(imported)
    weights, extra = model_dir / "serving.onnx", ""
    if imported.get("cpu") and gpu_sm() is None:  # the same network in the form that ONNX Runtime's CPU kernels like
        weights = model_dir / imported["cpu"]["file"]
    if variant is not None and variant.precision != "fp32":
        verdict = judge_sidecar(variant.sidecar or {}, _configured(limits)).get(variant.runtime)
        if verdict is None or not verdict.passed:
            why = verdict.why if verdict else f"it was never judged in {variant.runtime}"
            raise ProofFailed(
                f"{variant.file} of {imported['name']} has not passed its gate: {why}. "
                f"Next: arcface quantize {imported['name']} --precision {variant.precision}"
            )
        weights, extra = model_dir / variant.file, variant.accelerator_pbtxt()
        told = {key: value for key, value in variant.to_json().items() if key != "reason"}
        manifest |= {"precision": variant.precision, "variant": told}
    manifest["weights"] = weights.relative_to(model_dir).as_posix()
    return {
        # The reference first: a version of arcface_onnx never stands there without what proves it.
        "arcface_reference": install(
            repository, "arcface_reference", {"source.onnx": model_dir / "source.onnx"}, imported, keep=keep
        ),
        "arcface_onnx": install(
            repository, "arcface_onnx", {"model.onnx": weights}, manifest, overlay=extra, keep=keep
        ),
    }


def assemble_plans(
    model_dir: Path,
    plans: Sequence[Path],
    repository: Path,
    keep: int = KEPT_VERSIONS,
    limits: Mapping[str, float] | None = None,
) -> int:
    """Install plans (each with its manifest beside it) as one new version of arcface_trt.

    Plans of other SMs that the version before held stay, where they are of the same contract and precision.
    `limits`: largest drift by precision; None takes comparison.max_drift of the configuration.

    Returns:
        The version number.

    Raises:
        PlanRefused: a plan is not what its manifest says, of another contract or precision, or failed its gate.
        Missing: a file is not there.
    """
    from arcface_clients.plans.manifest import check_content, load_manifest, manifest_path

    imported = _imported(model_dir)
    files: dict[str, Path] = {}
    entries: dict[str, Any] = {}
    precisions, limits = set(), _configured(limits)
    for plan in plans:
        manifest = load_manifest(manifest_path(plan))
        check_content(plan, manifest, str(plan))
        verdict = judge_record(manifest.drift, manifest.spec.precision, limits)
        if not verdict.passed:
            raise PlanRefused(f"{plan.name} is refused: {verdict.why}. Build it again: arcface plan build")
        if manifest.contract_id != imported["contract_id"]:
            raise PlanRefused(
                f"{plan.name} is of contract {str(manifest.contract_id)[:12]}…, expected that of {imported['name']}, "
                f"{imported['contract_id'][:12]}…. Its embeddings could not be compared. Build it from this model: "
                f"arcface plan build {imported['name']}"
            )
        precisions.add(manifest.spec.precision)
        name = f"sm{manifest.spec.sm.replace('.', '')}.plan"
        files[name], entries[name] = plan, manifest.to_json()
    if len(precisions) != 1:
        raise PlanRefused(f"one version serves one precision, got plans of {', '.join(sorted(precisions)) or 'none'}.")
    precision = precisions.pop()
    before = served_manifest(repository, "arcface_trt") or {}
    if (before.get("contract_id"), before.get("precision")) == (imported["contract_id"], precision):
        kept = {
            name: entry
            for name, entry in before["plans"].items()
            if name not in entries and judge_record(entry.get("drift"), precision, limits).passed
        }
        folder = served_folder(repository, "arcface_trt")
        files |= {name: folder / name for name in kept}
        entries |= kept
    manifest_out = {key: imported[key] for key in ("name", "source", "preprocessing", "dim", "contract_id")}
    manifest_out |= {"precision": precision, "plans": dict(sorted(entries.items()))}
    return install(repository, "arcface_trt", files, manifest_out, keep=keep)


def _configured(limits: Mapping[str, float] | None) -> Mapping[str, float]:
    if limits is not None:
        return limits
    from arcface_clients.config.sources import load_config

    return load_config().comparison.max_drift.model_dump()


def _imported(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "manifest.json"
    if not path.is_file():
        raise Missing(f"no imported model in {model_dir}: expected manifest.json there. Next: arcface import SOURCE")
    return json.loads(path.read_text())
