"""Reads the precision of each layer from a typed ONNX, and rejects what TensorRT cannot build.

The ONNX determines precision: TensorRT 10 and newer follow it (strong typing), 8.6 gets builder flags that match it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arcface_build.graph.tensorrt_form import UNTOUCHED, TensorRtForm, form_of
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT, FACE_SHAPE, OUTPUTS
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.extras import how_to_get
from arcface_clients.plans.manifest import file_sha256
from arcface_clients.plans.spec import parse_version

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

COMPUTE_OPS = ("Conv", "Gemm", "MatMul")
_SHAPE_OPS = ("Shape", "Size")
LAST_OPSET_OF_8_6 = 17  # onnx-tensorrt 8.6-GA, docs/operators.md
_LAST_OPSET_OF_INT8 = 19  # its float16 scales need 19; for 8.6 `weakly_typed` brings the file back to 17


@dataclass(frozen=True)
class TypedOnnx:
    """Facts about a typed ONNX file.

    layers: Conv, Gemm and MatMul nodes by the precision in which they compute ("fp32", "fp16", "bf16", "int8").
    pins: node or output name → "fp32" or "fp16", for what a weakly typed builder (8.6) must be told.
    form: how the graph was rewritten for TensorRT (`tensorrt_form`), as the file says.
    """

    path: Path
    sha256: str
    opset: int
    dim: int | None
    layers: Mapping[str, int]
    pins: Mapping[str, str]
    form: TensorRtForm = UNTOUCHED

    @property
    def precision(self) -> str:
        """The lowest precision that any layer computes in, which names the plan."""
        return next((p for p in ("int8", "fp16", "bf16") if self.layers.get(p)), "fp32")


def read_typed_onnx(path: Path) -> TypedOnnx:
    """Read and check an ONNX file without its external data.

    Raises:
        Missing: no such file, or onnx is not installed.
        WrongUse: not ONNX, not the tensor contract, or a uint8 input that TensorRT does not accept.
    """
    try:
        import onnx
    except ImportError as exc:
        raise Missing(f"building plans needs the package onnx. Next: {how_to_get('onnx')}") from exc
    if not path.is_file():
        raise Missing(f"no ONNX file at {path}. Make one: arcface import SOURCE, then arcface quantize NAME")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as exc:  # protobuf's DecodeError, which has no public import path
        raise WrongUse(f"{path} is not an ONNX file ({type(exc).__name__}).") from exc
    check_interface(model, str(path))
    types = tensor_types(model.graph)
    layers = Counter(layer_precisions(model.graph, types).values())
    dims = model.graph.output[0].type.tensor_type.shape.dim
    return TypedOnnx(
        path=path,
        sha256=file_sha256(path),
        opset=next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
        dim=dims[1].dim_value or None if len(dims) == 2 else None,
        layers=dict(layers),
        pins=precision_pins(model.graph, types),
        form=form_of(model),
    )


def check_interface(model: ModelProto, where: str) -> None:
    """Check for input `face` uint8 [N,112,112,3], read only by Cast nodes, and output `embedding` float32.

    TensorRT accepts UINT8 network inputs since 8.5, but computes nothing in it: the first layer must be a cast.

    Raises:
        WrongUse: anything else.
    """
    from onnx import TensorProto

    names = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in names]
    shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(inputs) != 1 or inputs[0].name != FACE_INPUT or tuple(shape[1:]) != FACE_SHAPE or shape[0]:
        got = ", ".join(f"{i.name}{[d.dim_value or 'N' for d in i.type.tensor_type.shape.dim]}" for i in inputs)
        raise WrongUse(
            f"{where} is not serving ONNX: expected one input {FACE_INPUT}[N, 112, 112, 3], got {got or 'none'}. "
            "Make it: arcface import SOURCE"
        )
    outputs = [o.name for o in model.graph.output]
    if EMBEDDING_OUTPUT not in outputs or not set(outputs) <= set(OUTPUTS):
        raise WrongUse(f"{where}: expected the outputs {', '.join(OUTPUTS)}, got {', '.join(outputs) or 'none'}.")
    kind = inputs[0].type.tensor_type.elem_type
    if kind != TensorProto.UINT8:
        raise WrongUse(f"{where}: expected {FACE_INPUT} of type UINT8, got {TensorProto.DataType.Name(kind)}.")
    readers = sorted({node.op_type for node in model.graph.node if FACE_INPUT in node.input})
    if readers != ["Cast"]:
        raise WrongUse(
            f"{where}: {FACE_INPUT} is read by {', '.join(readers) or 'nothing'}: expected only Cast, because "
            "TensorRT computes nothing in uint8. Import the source again: arcface import SOURCE"
        )


def tensor_types(graph: GraphProto) -> dict[str, int]:
    """The element type of every tensor, propagated through the few operators that change it."""
    from onnx import TensorProto

    types = {i.name: i.data_type for i in graph.initializer}
    types |= {i.name: i.type.tensor_type.elem_type for i in graph.input if i.name not in types}
    for node in graph.node:
        first = types.get(node.input[0], 0) if node.input else 0
        if node.op_type == "Cast":
            kind = next(a.i for a in node.attribute if a.name == "to")
        elif node.op_type == "Constant":
            kind = next((a.t.data_type for a in node.attribute if a.name == "value"), TensorProto.FLOAT)
        elif node.op_type == "QuantizeLinear":
            kind = types.get(node.input[2], TensorProto.UINT8) if len(node.input) > 2 else TensorProto.UINT8
        elif node.op_type == "DequantizeLinear":
            kind = types.get(node.input[1], TensorProto.FLOAT)
        elif node.op_type in _SHAPE_OPS:
            kind = TensorProto.INT64
        elif node.op_type == "ConstantOfShape":
            kind = next((a.t.data_type for a in node.attribute if a.name == "value"), TensorProto.FLOAT)
        elif node.op_type in ("Where", "Equal", "Greater", "Less"):
            kind = types.get(node.input[1], 0) if node.op_type == "Where" else TensorProto.BOOL
        else:
            kind = first
        types |= dict.fromkeys(node.output, kind)
    return types


def layer_precisions(graph: GraphProto, types: Mapping[str, int]) -> dict[str, str]:
    """Output name of each Conv, Gemm and MatMul → its precision; int8 if input and weights are dequantised."""
    producers = {name: node.op_type for node in graph.node for name in node.output}
    found = {}
    for node in graph.node:
        if node.op_type in COMPUTE_OPS:
            quantised = [producers.get(name) == "DequantizeLinear" for name in node.input[:2]]
            found[node.output[0]] = (
                "int8" if all(quantised) else _PRECISION_NAMES.get(types.get(node.output[0], 0), "fp32")
            )
    return found


def precision_pins(graph: GraphProto, types: Mapping[str, int]) -> dict[str, str]:
    """The pins for a weakly typed builder, by node name and by output name; {} if nothing is fp16.

    fp32: every node that computes in float32, because the FP16 flag would let TensorRT lower it. fp16: only Conv, Gemm
    and MatMul; the rest may run in whatever is fastest. int8 layers need no pin: their Q/DQ nodes are enough.
    """
    moving = ("Cast", "Constant", "QuantizeLinear", "DequantizeLinear", "Identity", *_SHAPE_OPS)
    precisions = layer_precisions(graph, types)
    if FLOAT16 not in {types.get(name) for node in graph.node for name in node.output}:
        return {}
    pins: dict[str, str] = {}
    for node in graph.node:
        output = node.output[0]
        kind = precisions.get(output) or ("fp32" if _PRECISION_NAMES.get(types.get(output, 0)) == "fp32" else "")
        if node.op_type not in moving and kind in ("fp32", "fp16"):
            pins |= {name: kind for name in (node.name, output) if name}
    return pins


def check_buildable(typed: TypedOnnx, precision: str, tensorrt: str) -> None:
    """Reject up front what would fail after minutes of building, or build something other than requested.

    Raises:
        WrongUse: the ONNX is of another precision, or this TensorRT cannot build it.
    """
    if typed.precision != precision:
        raise WrongUse(
            f"{typed.path} computes in {typed.precision} ({dict(typed.layers)}), expected {precision}: the ONNX "
            "determines the precision of a plan. Make that one: "
            f"arcface quantize NAME --precision {precision} --target tensorrt"
        )
    if parse_version(tensorrt) >= (10,):
        return
    if precision == "bf16":
        raise WrongUse(f"TensorRT {tensorrt} builds no bf16: expected 10 or newer. Use --precision fp16 here.")
    last = _LAST_OPSET_OF_INT8 if precision == "int8" else LAST_OPSET_OF_8_6
    if typed.opset > last:
        raise WrongUse(
            f"{typed.path} has opset {typed.opset}; TensorRT {tensorrt} parses up to {last}. "
            "Build with TensorRT 10 or newer."
        )


FLOAT16 = 10  # onnx.TensorProto
_PRECISION_NAMES = {1: "fp32", FLOAT16: "fp16", 16: "bf16"}  # FLOAT, BFLOAT16
