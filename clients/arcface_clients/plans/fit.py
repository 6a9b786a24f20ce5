"""Whether a plan fits a request: one pure rule, shared by the engine, the server, the store and their tables."""

from __future__ import annotations

from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.spec import parse_sm, parse_version

HARDWARE_COMPATIBLE_FROM = 8.0  # Ampere; TensorRT documentation, "Hardware Compatibility": AMPERE_PLUS


def misfit(
    manifest: PlanManifest,
    sm: str | None = None,
    tensorrt: str | None = None,
    *,
    precision: str | None = None,
    model: str | None = None,
    contract_id: str | None = None,
) -> str | None:
    """Why this plan does not match or does not load, in a few words; None if it fits. A None argument is not checked.

    A plan is tied to its TensorRT version and its SM. A hardware-compatible one loads on every SM from 8.0 on, and
    TensorRT builds such plans only on those SMs.
    """
    spec = manifest.spec
    if model is not None and spec.model != model:
        return f"a plan of {spec.model}, expected {model}"
    if contract_id is not None and manifest.contract_id != contract_id:
        return f"of contract {str(manifest.contract_id)[:12]}…, expected {contract_id[:12]}…"
    if precision is not None and spec.precision != precision:
        return f"of precision {spec.precision}, expected {precision}"
    if tensorrt is not None and not same_tensorrt(spec.tensorrt, tensorrt):
        return f"built with TensorRT {spec.tensorrt}, this host has {tensorrt}"
    if sm is None or parse_sm(sm) == spec.sm:
        return None
    if not spec.options.hardware_compatible:
        return f"built for SM {spec.sm}, this GPU is SM {parse_sm(sm)}"
    if min(float(spec.sm), float(parse_sm(sm))) < HARDWARE_COMPATIBLE_FROM:
        return f"hardware-compatible from SM 8.0 on, built for SM {spec.sm}, this GPU is SM {parse_sm(sm)}"
    return None


def same_tensorrt(a: str, b: str) -> bool:
    """Whether two TensorRT versions load each other's plans: that is, agree in major, minor and patch."""
    return parse_version(a)[:3] == parse_version(b)[:3]
