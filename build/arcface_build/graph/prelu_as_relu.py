"""Rewrites PRelu as Relu, Min, Mul and Add, which TensorRT fuses with the additions around them.

    PRelu(x) = Relu(x) + a·Min(x, 0)     each side of zero has one term, so no rounding is added

TensorRT has a layer kind of its own for PRelu, which its pointwise fusion leaves alone. Which form is faster on
a GPU is for gpu-check to measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.index import GraphIndex, drop_unused, replace_nodes, shapes

if TYPE_CHECKING:
    import onnx


def prelu_as_relu(model: onnx.ModelProto) -> Step:
    """Rewrite every PRelu with a constant slope, in place; new nodes are called like it, with ".relu" and so on."""
    graph = model.graph
    known, index = shapes(model), GraphIndex(graph)
    instead = {node.output[0]: _pointwise(index, known, node) for node in graph.node if node.op_type == "PRelu"}
    found = {name: nodes for name, nodes in instead.items() if nodes}
    replace_nodes(graph, found)
    drop_unused(graph)
    why = f"{len(found)} of {len(instead)} PRelu as Relu, Min, Mul and Add" if instead else "no PRelu"
    return Step("prelu_as_relu", model, bool(found), why)


def _pointwise(index: GraphIndex, known: Mapping[str, Sequence[object]], node: onnx.NodeProto) -> list[onnx.NodeProto]:
    from onnx.helper import make_node

    slope = index.constant(node.input[1])
    if slope is None:
        return []
    x, y, name = node.input[0], node.output[0], node.name or node.output[0]
    # Of the rank of x, so that TensorRT's parser adds no layer to broadcast them.
    slope = slope.reshape(*[1] * max(len(known.get(x, [])) - slope.ndim, 0), *slope.shape)
    by = index.add_constant(f"{y}_slope", slope)
    zero = index.add_constant(f"{y}_zero", np.zeros([1] * slope.ndim, slope.dtype))
    return [
        make_node("Relu", [x], [f"{y}_above"], name=f"{name}.relu"),
        make_node("Min", [x, zero], [f"{y}_below"], name=f"{name}.min"),
        make_node("Mul", [f"{y}_below", by], [f"{y}_sloped"], name=f"{name}.mul"),
        make_node("Add", [f"{y}_above", f"{y}_sloped"], [y], name=f"{name}.add"),
    ]
