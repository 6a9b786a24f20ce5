"""For TensorRT 8.6: replaces stored int8 weights in an ONNX by float weights and a QuantizeLinear.

Before version 10, TensorRT quantises weights itself and rejects a convolution over stored int8 weights with "invalid
weights type of Int8" (microsoft/onnxruntime issue 11535). It also requires as many zero points as scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto


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
