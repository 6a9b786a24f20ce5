"""Gets a plan of an imported model for this host's GPU, from the cache, the store or a build."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from arcface_build.imports.proof_faces import read_faces, synthetic_proof_faces
from arcface_build.plans.build import PlanProof, build_plan, tensorrt_version
from arcface_build.plans.form import in_form
from arcface_build.plans.get_or_build import Obtained, get_or_build
from arcface_build.plans.gpu import find_gpus
from arcface_build.plans.places import Places
from arcface_build.plans.source import PlanSource, find_source
from arcface_build.plans.typed import check_buildable, read_typed_onnx
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.errors import WrongUse
from arcface_clients.gpu.cards import Gpu
from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.spec import BuilderOptions, PlanSpec, parse_bytes, parse_sm

PhaseBar = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]


@dataclass(frozen=True)
class PlanRequest:
    """The requested plan, with the options of `arcface plan build`; None: from the configuration."""

    model: str  # a name under models_dir, or a typed ONNX
    models_dir: Path
    precision: str | None = None
    sm: str = "auto"
    min_batch: int | None = None
    opt_batch: int | None = None
    max_batch: int | None = None
    profiles: tuple[int, ...] | None = None
    workspace: str | None = None
    optimization_level: int | None = None
    hardware_compatible: bool = False
    any_card: bool = False
    external_tactics: bool = True
    tf32: bool = False
    fold_padded: bool | None = None
    prelu: str | None = None
    faces: Path | None = None
    reference: Path | None = None
    timeout_s: float = 1800.0
    force: bool = False
    upload: bool = False
    output: Path | None = None
    sign_key: Path | None = None


def plan_for_this_gpu(asked: PlanRequest, places: Places, phases: PhaseBar) -> tuple[Obtained, Path]:
    """The verified plan, and where it is: in the cache, or in `asked.output`.

    Raises:
        WrongUse: the GPU has another SM, or the model cannot be built this way.
        Missing: no GPU or no TensorRT; or no plan, and building is disabled.
        PlanRefused: the built plan failed its proof.
    """
    config = places.config
    precision = asked.precision or config.precision
    gpu, version = find_gpus()[0], tensorrt_version()
    if asked.sm != "auto" and parse_sm(asked.sm) != gpu.sm:
        raise WrongUse(
            f"this GPU is an {gpu.name} of SM {gpu.sm}, expected SM {parse_sm(asked.sm)}: build on a GPU of that SM."
        )
    if asked.upload:
        places.need_store()
    found = find_source(asked.model, precision, asked.models_dir, asked.reference)
    check_buildable(read_typed_onnx(found.onnx), precision, version)
    with tempfile.TemporaryDirectory(prefix="arcface-form-") as folder:
        source = in_form(found, precision, Path(folder), fold_padded=asked.fold_padded, prelu=asked.prelu)
        obtained = _obtained(asked, places, phases, source, gpu, version)
    return obtained, places.cache.pull(obtained.manifest, asked.output) if asked.output else obtained.path


def _obtained(
    asked: PlanRequest, places: Places, phases: PhaseBar, source: PlanSource, gpu: Gpu, version: str
) -> Obtained:
    config, typed = places.config, read_typed_onnx(source.onnx)

    def build(spec: PlanSpec, target: Path) -> PlanManifest:
        crops = (read_faces(asked.faces) if asked.faces else synthetic_proof_faces()).faces
        proof = PlanProof(crops, source.embed(crops), config.comparison.max_drift.model_dump())
        with phases() as on_phase:
            return build_plan(
                typed,
                spec,
                target,
                proof,
                contract_id=source.contract_id,
                timing_caches=places.timing_caches,
                refused=places.refused,
                timeout_s=asked.timeout_s,
                on_phase=on_phase,
            )

    return get_or_build(
        spec_of(asked, config, source.name, typed.sha256, gpu, version),
        places.cache,
        places.store,
        build if asked.force or config.fallback.build_locally else None,
        read_cache=not asked.force,
        read_store=not asked.force,
        upload=asked.upload,
        sign_key=asked.sign_key,
    )


def spec_of(
    asked: PlanRequest, config: EmbeddingConfig, model: str, onnx_sha256: str, gpu: Gpu, tensorrt: str
) -> PlanSpec:
    """The spec of the plan: the request, completed by the configuration."""
    batch, sizes = config.batch, sorted(asked.profiles or (), reverse=True)
    largest = sizes[0] if sizes else 0
    opt_batch = asked.opt_batch or largest or min(batch.opt, asked.max_batch or batch.max)
    return PlanSpec(
        model=model,
        onnx_sha256=onnx_sha256,
        precision=asked.precision or config.precision,
        sm=gpu.sm,
        tensorrt=tensorrt,
        min_batch=asked.min_batch or batch.min,
        opt_batch=opt_batch,
        max_batch=asked.max_batch or max(batch.max, largest),
        options=BuilderOptions(
            workspace_bytes=parse_bytes(asked.workspace) if asked.workspace else config.workspace,
            external_tactics=asked.external_tactics,
            hardware_compatible=asked.hardware_compatible,
            tf32=asked.tf32,
            optimization_level=asked.optimization_level,
            same_compute_capability=asked.any_card,
        ),
        tuned_batches=tuple(size for size in sizes if size != opt_batch),
        gpu=None if asked.hardware_compatible or asked.any_card else gpu.name,
    )
