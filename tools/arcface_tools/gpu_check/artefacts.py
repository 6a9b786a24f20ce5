"""Networks, variants, plans and reference embeddings, each made once in the state folder, from seeds where possible.

A machine that is given anew has an empty state folder: what a stage needs is made again, what was measured is not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from arcface_build.errors import ProofFailed
from arcface_build.imports.source import file_digest
from arcface_build.plans.build import PlanProof, build_plan, tensorrt_version
from arcface_build.plans.form import in_form
from arcface_build.plans.gpu import find_gpus
from arcface_build.plans.source import PlanSource, find_source
from arcface_build.plans.typed import read_typed_onnx
from arcface_build.variants.make import load_named
from arcface_build.variants.search import layer_work
from arcface_clients.atomic import new_file, new_folder, write_json
from arcface_clients.errors import PlanRefused
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.plans.manifest import PlanManifest, manifest_path, parse_manifest, write_manifest
from arcface_clients.plans.spec import BuilderOptions, PlanSpec
from arcface_tools.gpu_check.check import GpuCheck

PROOF_FACES = 64
LOOSE = dict.fromkeys(DRIFT_LIMITS, 2.0)  # a plan that drifts is still worth measuring, and the report says so


@dataclass(frozen=True)
class Shape:
    """Which batches a plan is built for, and in which form of the graph (None: the usual), under a name."""

    name: str
    min_batch: int
    opt_batch: int
    max_batch: int
    tuned_batches: tuple[int, ...] = ()
    fold_padded: bool | None = None
    prelu: str | None = None


@dataclass(frozen=True)
class BuiltPlan:
    """A plan in the state folder; `refused` is why the build refused it, None for one that passed."""

    path: Path
    manifest: PlanManifest
    source: PlanSource
    refused: str | None = None

    @property
    def gflop_per_face(self) -> float:
        """Multiplications and additions of the convolutions, in 10⁹; the rest is a thousandth of them."""
        return 2 * sum(layer_work(load_named(self.source.reference)).values()) / 1e9


def dynamic(check: GpuCheck) -> Shape:
    """One profile from 1 to the largest batch, its kernels tuned for the batch that the goals are stated for."""
    largest = check.settings.batches[-1]
    return Shape("dynamic", 1, min(check.settings.opt_batch, largest), largest)


def imported(check: GpuCheck, network: str) -> Path:
    """models/NETWORK, imported from its source."""
    folder = check.state / "models"
    if not (folder / network / "manifest.json").is_file():
        source = dict(check.settings.networks)[network]
        line = ["import", source, "--name", network, "--models-dir", str(folder), "--no-assemble"]
        check.command(["-m", "arcface_build", *line], f"import-{network}.log")
    return folder / network


def typed_source(check: GpuCheck, network: str, precision: str) -> PlanSource:
    """The typed ONNX for TensorRT, judged and, for int8, calibrated on some of the run's faces.

    int8 without the search, because this measures speed; its drift is reported.
    """
    folder = imported(check, network)
    if precision != "fp32" and not (folder / "variants" / f"{precision}-tensorrt.onnx").is_file():
        loose = ["--no-search", "--max-drift", "2"] if precision == "int8" else []
        crops = check.state / "crops.npz"
        np.savez(crops, faces=check.faces[:PROOF_FACES])
        line = ["quantize", network, "--precision", precision, "--target", "tensorrt", "--eval", str(crops), *loose]
        line += ["--models-dir", str(folder.parent)]
        check.command(["-m", "arcface_build", *line], f"quantize-{network}-{precision}.log")
    return find_source(network, precision, folder.parent)


def reference(check: GpuCheck, source: PlanSource) -> np.ndarray:
    """The CPU's embeddings of the run's faces, computed once for each network: float32 (N,D)."""
    kept = check.state / f"reference-{file_digest(source.reference)[:12]}-{len(check.faces)}.npy"
    if not kept.is_file():
        embeddings = source.embed(check.faces)
        with new_file(kept) as temporary, temporary.open("wb") as file:
            np.save(file, embeddings)
    return np.asarray(np.load(kept))


def plan(check: GpuCheck, network: str, precision: str, shape: Shape | None = None) -> BuiltPlan:
    """The plan of a network for this GPU, built and proved if it is not in the state folder yet."""
    shape = shape or dynamic(check)
    return plan_of(check, _formed(check, typed_source(check, network, precision), precision, shape), precision, shape)


def plan_of(
    check: GpuCheck, source: PlanSource, precision: str, shape: Shape, proof: PlanProof | None = None
) -> BuiltPlan:
    """The plan of a typed ONNX; `proof` defaults to some of the run's faces with the reference's embeddings."""
    typed = read_typed_onnx(source.onnx)
    spec = PlanSpec(
        source.name, typed.sha256, precision, find_gpus()[0].sm, tensorrt_version(), shape.min_batch, shape.opt_batch,
        shape.max_batch, BuilderOptions(external_tactics=check.settings.external_tactics),
        tuned_batches=shape.tuned_batches,
    )  # fmt: skip
    path = check.state / "plans" / f"{source.name}-{precision}-{shape.name}" / spec.file_name
    if path.is_file() and manifest_path(path).is_file():
        manifest = parse_manifest(manifest_path(path).read_bytes(), str(path))
        if manifest.spec == spec:
            return BuiltPlan(path, manifest, source, _why_refused(path))
    if proof is None:
        proof = PlanProof(check.faces[:PROOF_FACES], reference(check, source)[:PROOF_FACES], LOOSE)
    logs = check.logs / path.parent.name
    _refusal(path).unlink(missing_ok=True)
    try:
        manifest = build_plan(
            typed, spec, path, proof, contract_id=source.contract_id, timing_caches=check.state / "timing",
            refused=logs / "refused", logs=logs, timeout_s=max(check.left_s, 1),
        )  # fmt: skip
    except (PlanRefused, ProofFailed):
        kept = logs / "refused" / f"{path.name}.refused"
        if not kept.is_file():
            raise
        kept.replace(path)  # how fast it is, is still worth knowing; the report says that it was refused
        told = json.loads((logs / "refused" / f"{path.name}.json.refused").read_text())
        write_json(_refusal(path), {"why": told.pop("why")})
        manifest = parse_manifest(json.dumps(told).encode(), str(path))
    write_manifest(path, manifest)
    return BuiltPlan(path, manifest, source, _why_refused(path))


def _refusal(plan: Path) -> Path:
    return plan.with_name("refused.json")


def _why_refused(plan: Path) -> str | None:
    return str(json.loads(_refusal(plan).read_text())["why"]) if _refusal(plan).is_file() else None


def _formed(check: GpuCheck, source: PlanSource, precision: str, shape: Shape) -> PlanSource:
    """The source in the form that `arcface plan build` would build, or in the one that the shape asks for; kept."""
    folder = check.state / "forms" / f"{source.name}-{precision}-{shape.name}"
    if not folder.is_dir():
        with new_folder(folder) as made:
            in_form(source, precision, made, fold_padded=shape.fold_padded, prelu=shape.prelu)
    written = next(folder.glob("*.onnx"), None)  # none: the source has that form already
    return replace(source, onnx=written) if written else source


def inspected(check: GpuCheck, built: BuiltPlan) -> list[dict[str, object]]:
    """The layers of a plan as the engine inspector told them when it was built; empty if that was not kept."""
    file = check.logs / built.path.parent.name / f"{built.manifest.spec.file_name}.inspector.json"
    return list(json.loads(file.read_text())["Layers"]) if file.is_file() else []
