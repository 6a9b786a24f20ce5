"""Which plans fit a GPU: a pure function over a manifest, an SM and a TensorRT version."""

from __future__ import annotations

from arcface_clients.plans.manifest import PlanManifest
from arcface_clients.plans.spec import parse_sm, parse_version


def misfit(manifest: PlanManifest, sm: str, tensorrt: str | None = None) -> str | None:
    """Why this plan does not load on a GPU of this SM under this TensorRT version (None: not known), or None.

    A plan is tied to its TensorRT version and its SM; a hardware-compatible one loads on SM 8.0 and every newer SM
    (TensorRT documentation, "Hardware Compatibility": AMPERE_PLUS).
    """
    spec = manifest.spec
    if tensorrt is not None and parse_version(spec.tensorrt) != parse_version(tensorrt):
        return f"built with TensorRT {spec.tensorrt}, this host has {tensorrt}"
    if parse_sm(spec.sm) == parse_sm(sm):
        return None
    if not spec.options.hardware_compatible:
        return f"built for SM {spec.sm}, this GPU is SM {parse_sm(sm)}"
    if min(float(spec.sm), float(parse_sm(sm))) < 8.0:
        return f"hardware-compatible from SM 8.0 on, this GPU is SM {parse_sm(sm)}"
    return None
