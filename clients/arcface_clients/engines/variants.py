"""A precision and what a variant's sidecar says in; how its floats are computed on this CPU, and why, out. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from arcface_clients.errors import ModelMissing


def cpu_runtime(
    precision: str, openvino: bool, bf16: bool, gated: Collection[str] | None, file: Path
) -> tuple[str, str]:
    """The runtime to compute in on a CPU, and the reason.

    A quantised variant leaves some layers in float; it was gated with those in bf16, in fp32, or both, and may only be
    run as it was gated. Without a sidecar (a file that the user named) floats stay fp32.

    Args:
        precision: fp32, bf16, fp16 or int8.
        openvino: whether OpenVINO is the provider; else ONNX Runtime's own kernels.
        bf16: whether this CPU multiplies in bf16.
        gated: runtimes in which the variant passed its gate; None where no sidecar says.
        file: for the message.

    Raises:
        ModelMissing: it passed its gate in no runtime of this host; falls back.
    """
    if not openvino:
        possible = ["onnxruntime"]
    elif bf16 and precision in ("bf16", "int8"):
        possible = ["openvino-bf16", "openvino-fp32"]
    else:
        possible = ["openvino-fp32"]
    if precision == "bf16":
        why = "" if bf16 else "this CPU has no bf16 (avx512_bf16 or amx_bf16), so it runs in fp32"
        return possible[0], why
    if precision != "int8" or gated is None:
        return possible[-1], ""
    for runtime in possible:
        if runtime in gated:
            return runtime, f"int8 passed its gate in {runtime}"
    raise ModelMissing(
        f"{file} passed its gate in {', '.join(gated) or 'no runtime'}, this host has {' and '.join(possible)}. "
        "Gate it here: arcface quantize NAME --precision int8, or set another device"
    )


def gated_runtimes(sidecar: Mapping[str, Any] | None) -> list[str] | None:
    """Runtimes whose gate a variant passed; None where there is no sidecar."""
    if sidecar is None:
        return None
    return [gate["runtime"] for gate in sidecar.get("gates", []) if gate.get("passed")]
