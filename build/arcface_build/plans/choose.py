"""Which plan fits this GPU: pure functions over manifests and over Triton's cc_model_filenames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from arcface_build.errors import PlanNotFound
from arcface_build.plans.manifest import PlanManifest
from arcface_build.plans.spec import parse_sm, parse_version


@dataclass(frozen=True)
class Choice:
    """A plan and why it was taken."""

    manifest: PlanManifest
    reason: str


def misfit(manifest: PlanManifest, sm: str, tensorrt: str) -> str | None:
    """Why this plan does not load on a GPU of this SM under this TensorRT version, or None.

    A plan is tied to its TensorRT version and its SM; a hardware-compatible one loads on SM 8.0 and every newer SM
    (TensorRT documentation, "Hardware Compatibility": AMPERE_PLUS).
    """
    spec = manifest.spec
    if parse_version(spec.tensorrt) != parse_version(tensorrt):
        return f"built with TensorRT {spec.tensorrt}, this host has {tensorrt}"
    if parse_sm(spec.sm) == parse_sm(sm):
        return None
    if not spec.options.hardware_compatible:
        return f"built for SM {spec.sm}, this GPU is SM {parse_sm(sm)}"
    if min(float(spec.sm), float(parse_sm(sm))) < 8.0:
        return f"hardware-compatible from SM 8.0 on, this GPU is SM {parse_sm(sm)}"
    return None


def choose_plan(
    manifests: Iterable[PlanManifest],
    sm: str,
    tensorrt: str,
    precisions: Iterable[str] = ("int8", "fp16", "bf16", "fp32"),
) -> Choice:
    """The plan to serve: the first of `precisions` that fits; the exact SM before others, then the larger batch.

    Raises:
        PlanNotFound: none fits; the message says why for each.
    """
    manifests = list(manifests)
    reasons = {m.key: misfit(m, sm, tensorrt) for m in manifests}
    for precision in precisions:
        fitting = [m for m in manifests if m.spec.precision == precision and reasons[m.key] is None]
        if fitting:
            best = max(fitting, key=lambda m: (m.spec.sm == parse_sm(sm), m.spec.max_batch, m.key))
            how = "exact SM" if best.spec.sm == parse_sm(sm) else f"hardware-compatible, built on SM {best.spec.sm}"
            return Choice(best, f"{precision} for SM {parse_sm(sm)} under TensorRT {tensorrt} ({how})")
    why = "; ".join(
        f"{m.spec.file_name}: {reasons[m.key] or f'precision {m.spec.precision} is not asked for'}" for m in manifests
    )
    raise PlanNotFound(
        f"no plan fits SM {parse_sm(sm)} under TensorRT {tensorrt} ({why or 'there are no plans'}). "
        "Build one on this GPU: arcface plan build"
    )


def plan_file_for(sm: str, cc_model_filenames: Mapping[str, str]) -> str:
    """The file that config.pbtxt maps to this SM; there is no default, because a plan of another SM does not load.

    Raises:
        PlanNotFound: the SM is not mapped; the message names those that are.
    """
    mapped = {parse_sm(key): name for key, name in cc_model_filenames.items()}
    if parse_sm(sm) in mapped:
        return mapped[parse_sm(sm)]
    raise PlanNotFound(
        f"no plan for SM {parse_sm(sm)} in cc_model_filenames (mapped: {', '.join(mapped) or 'none'}). "
        f"Build one on an SM {parse_sm(sm)} GPU: arcface plan build, then arcface assemble"
    )
