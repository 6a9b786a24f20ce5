"""The precision proof: counts a plan's convolutions and matrix products by precision, from the engine inspector's JSON.

The format is TensorRT's (IEngineInspector::getEngineInformation, kJSON, of a plan built with DETAILED verbosity), as
documented (Engine Inspector; Migrating IEngineInspector Usage from 10.x to 11.x): up to version 10 each tensor has
"Format/Datatype" ("Thirty-two wide channel vectorized row major Int8 format", "Row major linear FP16 format", "Half");
11 has separate "Format" and "DataType". For a plan of dynamic shapes, formats are printed only if the inspector was
given an execution context with its input shapes set.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from arcface_clients.errors import PlanRefused

# LayerType or ParameterType of layers with weights: CaskConvolution, CudnnConvolution, CaskGemmConvolution,
# CaskGroupConvolution, MatrixMultiply, CaskGemmMatrixMultiply, FullyConnected, gemm, conv …
_COMPUTE = re.compile(r"conv(?!ert)|gemm|matrixmultiply|matmul|fullyconnected|fc$", re.IGNORECASE)
# If newer graph optimisers name a layer "fusion" or "cask", its kernel says what it is:
# sm80_xmma_fprop_implicit_gemm_…, sm80_xmma_gemm_i8f32_i8i32_f32_…, cutlass_…_gemm…
_COMPUTE_KERNEL = re.compile(r"fprop|implicit_gemm|xmma_gemm|gemm_|_gemm|winograd", re.IGNORECASE)
_OPAQUE = re.compile(r"myelin|foreignnode", re.IGNORECASE)
_NAMES = (  # the first match counts; bf16 before fp16 and fp32, whose names it contains
    ("int8", re.compile(r"int8|i8i8|s8s8|imma", re.IGNORECASE)),
    ("bf16", re.compile(r"bf16|bfloat16", re.IGNORECASE)),
    ("fp16", re.compile(r"fp16|float16|half|f16f16|h884|h1688|h16816|hmma", re.IGNORECASE)),
    ("fp32", re.compile(r"fp32|float32|\bfloat\b|f32f32|tf32|sgemm|scudnn", re.IGNORECASE)),
)


@dataclass(frozen=True)
class PrecisionProof:
    """Counts of the plan's layers. compute: convolutions and matrix products by precision, including "unknown"; those
    that the plan's metadata traces to the same ONNX layers count once, because a product may be split into kernels.

    all_layers: every layer by LayerType. opaque: Myelin subgraphs of TensorRT 8.6, which the inspector does not show.
    """

    compute: Mapping[str, int] = field(default_factory=dict)
    all_layers: Mapping[str, int] = field(default_factory=dict)
    opaque: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def count_precisions(inspector: str | Mapping[str, Any]) -> PrecisionProof:
    """Count the layers of one plan.

    Raises:
        PlanRefused: not the inspector's JSON, or a plan built without DETAILED verbosity (only layer names).
    """
    try:
        layers = list((json.loads(inspector) if isinstance(inspector, str) else inspector)["Layers"])
    except (ValueError, TypeError, KeyError) as exc:
        raise PlanRefused(f"the engine inspector gave no layers ({type(exc).__name__}: {exc}).") from exc
    if any(not isinstance(layer, Mapping) for layer in layers):
        raise PlanRefused(
            "the plan states only the names of its layers, so its precision cannot be proved: it was built without "
            "ProfilingVerbosity.DETAILED. Build it again: arcface plan build"
        )
    compute: Counter[str] = Counter()
    counted: set[tuple[str, str]] = set()
    kinds: Counter[str] = Counter()
    opaque = 0
    for layer in layers:
        kind = str(layer.get("LayerType", ""))
        kinds[kind] += 1
        if (
            _COMPUTE.search(kind)
            or _COMPUTE.search(str(layer.get("ParameterType", "")))
            or _COMPUTE_KERNEL.search(str(layer.get("TacticName", "")))
        ):
            source, precision = str(layer.get("Metadata", "")), layer_precision(layer)
            if not source or (source, precision) not in counted:  # several kernels may compute one layer of the ONNX
                compute[precision] += 1
            counted.add((source, precision))
        elif _OPAQUE.search(kind) or "ForeignNode" in str(layer.get("Name", "")):
            opaque += 1
    return PrecisionProof(dict(compute), dict(kinds), opaque)


def layer_precision(layer: Mapping[str, Any]) -> str:
    """The precision of one layer: by its first input, else its weights, else its kernel's name, else "unknown".

    The input decides, because an int8 convolution may write fp16 or fp32.
    """
    inputs = [tensor for tensor in layer.get("Inputs", []) if isinstance(tensor, Mapping)]
    weights = layer.get("Weights")
    candidates = [
        *(str(inputs[0].get(name, "")) for name in ("DataType", "Datatype", "Format/Datatype") if inputs),
        str(weights.get("Type", "")) if isinstance(weights, Mapping) else "",
        str(layer.get("TacticName", "")),
    ]
    for text in candidates:
        for name, pattern in _NAMES:
            if pattern.search(text):
                return name
    return "unknown"


def check_precision(proof: PrecisionProof, asked: str, onnx_layers: Mapping[str, int]) -> None:
    """Refuse a plan that computes in a higher precision than its typed ONNX states.

    onnx_layers: Conv, Gemm and MatMul of the typed ONNX by precision; layers it keeps in fp32 may be fp32 in the plan.
    TensorRT may fuse or fold layers, so fewer are fine; more layers of a higher precision are not.

    Raises:
        PlanRefused: too many layers of a higher precision, or none of the requested one.
    """
    order = ("int8", "fp16", "bf16", "fp32", "unknown")
    higher = order[order.index(asked) + 1 :] if asked != "fp16" else ("fp32", "unknown")
    for name in higher:
        allowed, got = onnx_layers.get(name, 0), proof.compute.get(name, 0)
        if got > allowed:
            raise PlanRefused(
                f"the plan should be {asked} but has {got} {name} convolutions or matrix products: expected at most "
                f"{allowed}, as in its ONNX (plan: {dict(proof.compute)}, ONNX: {dict(onnx_layers)}). Check that the "
                "ONNX is typed, and that TensorRT has kernels for it on this GPU; see arcface plan build --help"
            )
    if not proof.compute.get(asked):
        hidden = f"; {proof.opaque} subgraphs are hidden from the inspector" if proof.opaque else ""
        raise PlanRefused(
            f"the plan has no {asked} convolution or matrix product ({dict(proof.compute)}{hidden}), so its "
            "precision is not proved."
        )
