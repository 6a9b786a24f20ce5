"""Rewrites a serving model so that ONNX Runtime's CPU provider stays in its blocked memory layout.

That provider runs Conv and Relu in NCHWc (channels in blocks of 8 or 16), but leaves it for PRelu and, since opset 15,
for BatchNormalization: each one costs a reorder before and after. Depthwise 1×1 convolutions stay blocked:
    PRelu(x) = a·x + (1 − a)·ReLU(x)   for any slope a: x where x ≥ 0, a·x below
    BN(x)    = s·x + t                 s = scale / sqrt(var + epsilon), t = bias − s·mean
OpenVINO fuses PRelu and BatchNormalization itself, and was measured to be slower with this rewrite
(docs/measured/cpu_layout.json); TensorRT has a form of its own (`tensorrt_form`). So the result is a separate file
beside the serving ONNX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.fold_batchnorm import affine_of
from arcface_build.graph.index import GraphIndex, drop_unused, replace_nodes, shapes

if TYPE_CHECKING:
    import onnx

BLOCK = 8  # other channel counts are not blocked, so there is nothing to gain


def blocked_layout(model: onnx.ModelProto) -> Step:
    """Rewrite PRelu (one slope per channel) and BatchNormalization on feature maps; the rest is unchanged."""
    graph = model.graph
    known = shapes(model)
    index = GraphIndex(graph)
    instead: dict[str, list[onnx.NodeProto]] = {}
    counts = {"PRelu": 0, "BatchNormalization": 0}
    for node in graph.node:
        if node.op_type not in counts or len(known.get(node.input[0], [])) != 4:
            continue
        nodes = _prelu(index, node) if node.op_type == "PRelu" else _batchnorm(index, node)
        if nodes:
            instead[node.output[0]] = nodes
            counts[node.op_type] += 1
    replace_nodes(graph, instead)
    drop_unused(graph)
    done = " and ".join(f"{count} {op}" for op, count in counts.items() if count)
    return Step("blocked_layout", model, bool(done), f"{done} as depthwise 1×1 Conv" if done else "nothing to rewrite")


def _prelu(index: GraphIndex, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    from onnx.helper import make_node

    slope = index.constant(node.input[1])
    if slope is None or slope.ndim < 3 or slope.shape[-2:] != (1, 1) or slope.size % BLOCK:
        return []
    x, y = node.input[0], node.output[0]
    below = slope.astype(np.float32).reshape(-1)
    return [
        make_node("Relu", [x], [f"{y}_relu"], name=f"{y}_relu"),
        _scale(index, f"{y}_relu", f"{y}_above", 1 - below),
        _scale(index, x, f"{y}_below", below),
        make_node("Add", [f"{y}_above", f"{y}_below"], [y], name=f"{y}_sum"),
    ]


def _batchnorm(index: GraphIndex, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    affine = affine_of(index, node)
    if affine is None or affine[0].size % BLOCK:
        return []
    slope, shift = (value.astype(np.float32) for value in affine)
    return [_scale(index, node.input[0], node.output[0], slope, shift)]


def _scale(index: GraphIndex, x: str, y: str, slope: np.ndarray, shift: np.ndarray | None = None) -> onnx.NodeProto:
    """Depthwise 1×1 Conv: y = slope·x + shift per channel."""
    from onnx.helper import make_node

    weights = [index.add_constant(f"{y}_slope", slope.reshape(-1, 1, 1, 1))]
    if shift is not None:
        weights.append(index.add_constant(f"{y}_shift", shift))
    return make_node("Conv", [x, *weights], [y], name=y, group=slope.size, kernel_shape=[1, 1])
