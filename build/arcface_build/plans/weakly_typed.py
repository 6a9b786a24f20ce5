"""For TensorRT 8.6: rewrites a typed int8 ONNX into what a weakly typed parser takes, without changing what it means.

Before version 10, TensorRT takes float32 scales only, parses opset 17 at most, quantises weights itself and rejects a
convolution over stored int8 weights with "invalid weights type of Int8" (microsoft/onnxruntime issue 11535). So float16
becomes float32 here; the builder's FP16 flag and the pins of the typed file bring it back (`loaders`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph.index import GraphIndex, drop_unused, reconnect, replace_nodes
from arcface_build.graph.upgrade_opset import opset_of
from arcface_build.plans.typed import LAST_OPSET_OF_8_6, tensor_types

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Their axes were attributes until opset 17.
_REDUCE = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


def weakly_typed(model: ModelProto) -> None:
    """Rewrite `model` in place: no float16, opset 17 at most, no stored int8 weights.

    Names of nodes and of their results stay, so that pins read from the typed file still hold.
    """
    _as_float32(model)
    _as_opset_17(model)
    float_weights(model)


def _as_float32(model: ModelProto) -> None:
    from onnx import TensorProto, numpy_helper

    graph, floats = model.graph, (TensorProto.FLOAT, TensorProto.FLOAT16)
    types, outputs = tensor_types(graph), {value.name for value in graph.output}
    idle: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Cast" and node.attribute[0].i in floats:
            node.attribute[0].i = TensorProto.FLOAT
            if types.get(node.input[0]) in floats and node.output[0] not in outputs:
                idle[node.output[0]] = node.input[0]
    values = [item.t for node in graph.node for item in node.attribute if item.name == "value"]
    for tensor in [*graph.initializer, *values]:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    replace_nodes(graph, {name: [] for name in idle})
    reconnect(graph, idle)
    del graph.value_info[:]


def _as_opset_17(model: ModelProto) -> None:
    """Undo what opset 18 changed for the operators of our networks; 19 changed types only."""
    from onnx.helper import make_attribute

    if opset_of(model) <= LAST_OPSET_OF_8_6:
        return
    index = GraphIndex(model.graph)
    for node in model.graph.node:
        if node.op_type in {f"Reduce{kind}" for kind in _REDUCE} and len(node.input) > 1:
            axes = index.constant(node.input[1])
            if axes is not None:
                node.attribute.append(make_attribute("axes", [int(axis) for axis in axes]))
                del node.input[1:]
        if node.op_type == "Split":
            _without(node, "num_outputs")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = LAST_OPSET_OF_8_6
    model.ir_version = min(model.ir_version, 8)  # what belongs to that opset
    drop_unused(model.graph)


def _without(node: NodeProto, name: str) -> None:
    for position in reversed([i for i, a in enumerate(node.attribute) if a.name == name]):
        del node.attribute[position]


def float_weights(model: ModelProto) -> int:
    """Rewrite `model` in place, and return the number of weights changed.

    The float weight is the int8 one times its scale. Dividing by the same scale and rounding restores the int8 one
    exactly: the error of product and quotient is below 127 × 2**-23, far less than one half.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    nodes, changed = [], 0
    for node in graph.node:
        stored = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if stored is not None and numpy_helper.to_array(stored).dtype == np.int8:
            weight, scale = numpy_helper.to_array(stored), numpy_helper.to_array(constants[node.input[1]])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1) if scale.size > 1 else 0
            shape = [-1 if i == axis else 1 for i in range(weight.ndim)] if scale.size > 1 else [1] * weight.ndim
            name = f"{stored.name}_float"
            zero = f"{stored.name}_zero"
            floats = weight.astype(np.float32) * scale.astype(np.float32).reshape(shape)
            graph.initializer.append(numpy_helper.from_array(floats, name))
            graph.initializer.append(numpy_helper.from_array(np.zeros(scale.shape, np.int8), zero))
            inputs = [name, node.input[1], zero]
            quantize = helper.make_node("QuantizeLinear", inputs, [f"{name}_q"], f"{name}_q", axis=axis)
            nodes.append(quantize)
            del node.input[:]
            node.input.extend([quantize.output[0], *inputs[1:]])
            changed += 1
        nodes.append(node)
    if changed:
        ordered = [type(n).FromString(n.SerializeToString()) for n in nodes]
        del graph.node[:]
        graph.node.extend(ordered)
        used = {name for n in graph.node for name in n.input}
        kept = [type(i).FromString(i.SerializeToString()) for i in graph.initializer if i.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
    return changed
