"""Installs models and plans that passed their gates as new versions in the model repository, atomically.

models/NAME/ provides arcface_reference (the unchanged source) and arcface_onnx (the serving ONNX, or the variant chosen
for this CPU); plans with their manifests provide arcface_trt.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_build.errors import ProofFailed
from arcface_build.repository.install import install
from arcface_build.repository.integrity import CHOICE
from arcface_build.repository.profiles import CUDA_GRAPHS, with_profiles
from arcface_build.repository.versions import served_folder, served_manifest
from arcface_clients.engines.import_manifest import read_import_manifest
from arcface_clients.engines.model_folder import ModelFolder
from arcface_clients.engines.runtimes import runtime_for
from arcface_clients.errors import PlanRefused
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import judge_record, judge_sidecar
from arcface_clients.plans.fit import misfit
from arcface_clients.plans.manifest import file_sha256, manifest_path
from arcface_clients.plans.read import Plan, read_plan
from arcface_clients.plans.spec import parse_sm, sm_tag

if TYPE_CHECKING:
    from arcface_build.variants.choose import VariantChoice

KEPT_VERSIONS = 3
GPU_FILE = "model.gpu.onnx"  # beside model.onnx, where that is laid out for CPUs
_log = logging.getLogger(__name__)


def assemble(
    model_dir: Path,
    repository: Path,
    variant: VariantChoice | None = None,
    keep: int = KEPT_VERSIONS,
    limits: Mapping[str, float] = DRIFT_LIMITS,
    held: str | None = None,
) -> dict[str, int]:
    """Install an imported model; `variant` is what arcface_onnx serves instead of the fp32 serving ONNX.

    Args:
        model_dir: models/NAME.
        repository: the model repository.
        variant: a choice by `arcface_build.variants.choose.choose` that passed its gates.
        keep: number of versions to keep for rollbacks.
        limits: largest drift by precision (configuration: comparison.max_drift).
        held: BY_ASSEMBLE: `arcface serve` leaves arcface_onnx as it is; empty: it may choose; None: as it was.

    Returns:
        Model name → version number that now serves these weights.

    Raises:
        Missing: the folder contains no imported model.
        ProofFailed: the variant's sidecar does not show that it passes its gate in the chosen runtime.
        GateFailed: a file was replaced after it was proved.
    """
    imported = read_import_manifest(model_dir)
    manifest = imported.to_json()
    weights, extra = model_dir / "serving.onnx", ""
    files: dict[str, Path] = {}
    if imported.cpu:  # the same network, laid out for ONNX Runtime's CPU kernels: the serving host takes its own form
        files, extra = {GPU_FILE: weights}, _for_gpus(repository)
        weights = model_dir / imported.cpu["file"]
    if variant is not None and not variant.plain:
        _check_gate(variant, imported.name, limits)
        weights, extra, files = model_dir / variant.file, variant.accelerator_pbtxt(), {}
        told = {key: value for key, value in variant.to_json().items() if key not in ("reason", "measured", "offer")}
        if not variant.form:
            del told["form"]
        manifest |= {"precision": variant.precision, "variant": told}
    if variant is not None and variant.measured:
        manifest[CHOICE] = {**variant.measured, "reason": variant.reason}
    source, folder = model_dir / "source.onnx", ModelFolder(model_dir, imported)
    for file in (source, weights, *files.values()):
        folder.check_proved(file)
    manifest["weights"] = weights.relative_to(model_dir).as_posix()
    return {
        # The reference first, so that no version of arcface_onnx ever exists without its reference.
        "arcface_reference": install(
            repository, "arcface_reference", {"source.onnx": source}, imported.to_json(), keep=keep
        ),
        "arcface_onnx": install(
            repository,
            "arcface_onnx",
            {"model.onnx": weights, **files},
            manifest,
            overlay=extra,
            keep=keep,
            held=held,
        ),
    }


def _check_gate(variant: VariantChoice, name: str, limits: Mapping[str, float]) -> None:
    """Refuse a variant whose sidecar does not show that it passes in the chosen runtime; fp32 has none."""
    if variant.precision != "fp32":
        verdict = judge_sidecar(variant.sidecar or {}, limits).get(variant.runtime)
        if verdict is None or not verdict.passed:
            why = verdict.why if verdict else f"it was never judged in {variant.runtime}"
            raise ProofFailed(
                f"{variant.file} of {name} has not passed its gate: {why}. "
                f"Next: arcface quantize {name} --precision {variant.precision}"
            )
    runtime, why_not = runtime_for(variant.precision, [variant.runtime], [variant.runtime])
    if runtime is None:
        raise ProofFailed(f"{variant.file} of {name} is not served: {why_not}. Next: arcface quantize")


def assemble_plans(
    model_dir: Path,
    plans: Sequence[Path],
    repository: Path,
    keep: int = KEPT_VERSIONS,
    limits: Mapping[str, float] = DRIFT_LIMITS,
    public_key: Path | None = None,
    cuda_graphs: bool = False,
) -> int:
    """Install plans, each with its manifest beside it, as one new version of arcface_trt.

    Plans of the previous version for other SMs are kept if they have the same contract and precision. A
    hardware-compatible plan serves every mapped SM from 8.0 on that has no plan of its own.

    Args:
        model_dir: models/NAME; the plans must have its contract.
        plans: plan files.
        repository: the model repository.
        keep: number of versions to keep for rollbacks.
        limits: largest drift by precision (configuration: comparison.max_drift).
        public_key: PEM; if given, plans not signed by its private key are refused.
        cuda_graphs: Triton captures a CUDA graph of its usual batch sizes at start, and replays it.

    Returns:
        The version number.

    Raises:
        PlanRefused: a plan does not match its manifest, is unsigned, has another contract or precision, or failed its
            gate.
        Missing: a file does not exist.
    """
    imported = read_import_manifest(model_dir)
    given = [read_plan(path, public_key) for path in plans]
    for plan in given:
        verdict = judge_record(plan.manifest.drift, plan.manifest.spec.precision, limits)
        if not verdict.passed:
            raise PlanRefused(f"{plan.path.name} is refused: {verdict.why}. Build it again: arcface plan build")
        if plan.manifest.contract_id != imported.contract_id:
            raise PlanRefused(
                f"{plan.path.name} has contract {str(plan.manifest.contract_id)[:12]}…, expected that of "
                f"{imported.name}, {imported.contract_id[:12]}…. Its embeddings would not be comparable. "
                f"Build it from this model: arcface plan build {imported.name}"
            )
    precisions = {plan.manifest.spec.precision for plan in given}
    if len(precisions) != 1:
        raise PlanRefused(f"one version serves one precision, got plans of {', '.join(sorted(precisions)) or 'none'}.")
    precision = precisions.pop()
    before = _plans_before(repository, imported.contract_id, precision, public_key, limits)
    chosen = _by_sm(given, before, _mapped_sms(repository / "arcface_trt" / "config.pbtxt"))
    files: dict[str, Path] = {}
    for sm, plan in chosen.items():
        files |= {f"{sm_tag(sm)}.plan": plan.path, f"{sm_tag(sm)}.plan.json": manifest_path(plan.path)}
    told = imported.to_json()
    manifest = {key: told[key] for key in ("name", "source", "preprocessing", "dim", "contract_id", "golden")}
    # Complete manifests are stored beside the plans. Both digests are recorded: only changed plans make a new version.
    entries = {
        f"{sm_tag(sm)}.plan": {"sha256": plan.manifest.sha256, "manifest_sha256": file_sha256(manifest_path(plan.path))}
        for sm, plan in chosen.items()
    }
    manifest |= {"precision": precision, "plans": entries}
    counts = {sm: len(plan.manifest.spec.profiles) for sm, plan in chosen.items()}
    if (fewest := min(counts.values())) > 1:
        manifest["profiles"] = fewest
    if max(counts.values()) > fewest:
        _log.warning(
            "one config.pbtxt serves every SM, so only the first %d profiles of each plan are used: %s have more",
            fewest,
            ", ".join(f"sm{sm}" for sm, count in counts.items() if count > fewest),
        )
    with_profiles((repository / "arcface_trt" / "config.pbtxt").read_text(), fewest)  # refused before anything changes
    overlay = CUDA_GRAPHS if cuda_graphs else ""
    return install(repository, "arcface_trt", files, manifest, overlay=overlay, keep=keep)


def _plans_before(
    repository: Path, contract_id: str, precision: str, public_key: Path | None, limits: Mapping[str, float]
) -> dict[str, Plan]:
    """SM → plan of the current version, if it has this contract and precision and is still valid."""
    have = served_manifest(repository, "arcface_trt") or {}
    if (have.get("contract_id"), have.get("precision")) != (contract_id, precision):
        return {}
    kept = {}
    for path in served_folder(repository, "arcface_trt").glob("sm*.plan"):
        try:
            plan = read_plan(path, public_key)
            verdict = judge_record(plan.manifest.drift, precision, limits)
            if not verdict.passed:
                raise PlanRefused(f"{path}: {verdict.why}")
            kept[parse_sm(path.stem)] = plan
        except PlanRefused as exc:
            _log.error("not kept in the new version of arcface_trt: %s", exc)
    return kept


def _by_sm(given: Sequence[Plan], before: Mapping[str, Plan], mapped: Sequence[str]) -> dict[str, Plan]:
    """SM → the plan that serves it: a new plan for it, else a kept one, else a hardware-compatible one."""
    chosen = {sm: plan for sm, plan in before.items() if plan.manifest.spec.sm == sm}
    chosen |= {plan.manifest.spec.sm: plan for plan in given}
    for plan in (*given, *before.values()):
        for sm in mapped:
            if sm not in chosen and misfit(plan.manifest, sm) is None:
                chosen[sm] = plan
    return dict(sorted(chosen.items(), key=lambda item: float(item[0])))


def _for_gpus(repository: Path) -> str:
    """The line of config.pbtxt by which instances on a GPU load the serving ONNX itself, not the form for CPUs."""
    sms = _mapped_sms(repository / "arcface_trt" / "config.pbtxt")
    mapped = ", ".join(f'{{ key: "{sm}" value: "{GPU_FILE}" }}' for sm in sms)
    return f"cc_model_filenames [ {mapped} ]\n"


def _mapped_sms(config: Path) -> list[str]:
    """The SMs mapped in the hand-written cc_model_filenames."""
    return re.findall(r'key:\s*"(\d+\.\d)"\s*value:\s*"sm\d+\.plan"', config.read_text())
