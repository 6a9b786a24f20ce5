"""Makes an int8 ONNX: Q/DQ nodes on convolution inputs and weights, except for the layers to keep.

Convolution *outputs* stay float, so residual sums do not lose precision (quantised outputs cost several times the
drift). Weights are int8, symmetric, one scale per channel. onnxruntime.quantization writes the Q/DQ nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph.index import sort_nodes
from arcface_build.variants.calibrate import LEVELS
from arcface_clients.errors import WrongUse

if TYPE_CHECKING:
    import onnx

Range = tuple[float, float]


def quantizable_layers(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions with constant weights, in graph order."""
    constants = {i.name for i in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type == "Conv" and n.input[1] in constants]


def quantize_convolutions(
    model: onnx.ModelProto, ranges: Mapping[str, Range], target: str, keep: Collection[str] = ()
) -> onnx.ModelProto:
    """A copy of `model` whose convolutions, except those in `keep`, have 8-bit inputs and weights.

    Args:
        model: serving ONNX, every node named.
        ranges: the range of each convolution input (`calibrate.least_error_range`).
        target: "cpu" (uint8 activations) or "tensorrt" (symmetric int8).
        keep: names of convolutions that stay float.

    Raises:
        WrongUse: a convolution to be quantised has no range.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    layers = [name for name in quantizable_layers(model) if name not in keep]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if not layers:
        return copy
    inputs = {n.name: n.input[0] for n in model.graph.node}
    if without := [name for name in layers if inputs[name] not in ranges]:
        raise WrongUse(
            f"the recipe has no range for the input of {len(without)} of {len(layers)} convolutions, such as "
            f"{without[0]}. Leave out --recipe to calibrate again."
        )
    limits = TensorsData(
        CalibrationMethod.MinMax,
        {
            name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
            for name, (low, high) in ranges.items()
        },
    )
    quantizer = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if target == "cpu" else QuantType.QInt8,
        tensors_range=limits,
        nodes_to_quantize=layers,
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv"],
        extra_options={
            "ActivationSymmetric": target == "tensorrt",
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
            "QuantizeBias": False,
        },
    )
    quantizer.quantize_model()
    typed: onnx.ModelProto = quantizer.model.model
    sort_nodes(typed.graph)  # the library appends the nodes that it makes
    _spare_other_readers(typed, set(layers))
    return typed


def _spare_other_readers(typed: onnx.ModelProto, layers: Collection[str]) -> None:
    """Let only the quantised convolutions read dequantised tensors.

    The library would make every reader do so: where a shortcut convolution begins, the residual stream itself would be
    rounded (demo r18: that layer then costs 1.7e-3 of drift, not 0.9e-3).
    """
    quantized_from = {n.output[0]: n.input[0] for n in typed.graph.node if n.op_type == "QuantizeLinear"}
    dequantized_from = {
        n.output[0]: quantized_from[n.input[0]]
        for n in typed.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in quantized_from
    }
    for node in typed.graph.node:
        if node.name not in layers:
            node.input[:] = [dequantized_from.get(name, name) for name in node.input]


def make_coarse(part: onnx.ModelProto, layer: str, ranges: Mapping[str, Range], target: str) -> None:
    """Change one convolution of `part`, in place, as `quantize_convolutions` would.

    For probing: it rounds the float weights instead of writing int8 ones, and takes milliseconds, while the library's
    pass over a whole network takes seconds (r100: 2 s, too slow for a hundred probes).
    """
    from onnx import helper, numpy_helper

    position, node = next((i, n) for i, n in enumerate(part.graph.node) if n.name == layer)
    low, high = ranges[node.input[0]]
    lowest, highest = LEVELS[target]
    scale = np.float32((high - low) / (highest - lowest))
    zero = np.array(0 if target == "tensorrt" else round(-low / scale), np.int8 if target == "tensorrt" else np.uint8)
    weight = next(i for i in part.graph.initializer if i.name == node.input[1])
    values = numpy_helper.to_array(weight)
    step = np.abs(values).max(axis=(1, 2, 3), keepdims=True).clip(1e-12) / 127
    rounded = (np.rint(values / step) * step).astype(np.float32)
    names = [f"{layer}.probe.{what}" for what in ("weight", "scale", "zero", "q", "dq")]
    part.graph.initializer.extend(
        numpy_helper.from_array(array, name)
        for array, name in zip((rounded, np.array(scale), zero), names[:3], strict=True)
    )
    part.graph.node.insert(position, helper.make_node("QuantizeLinear", [node.input[0], *names[1:3]], [names[3]]))
    part.graph.node.insert(position + 1, helper.make_node("DequantizeLinear", [names[3], *names[1:3]], [names[4]]))
    changed = part.graph.node[position + 2]
    changed.input[0], changed.input[1] = names[4], names[0]
