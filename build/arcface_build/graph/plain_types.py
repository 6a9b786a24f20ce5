"""Types: a file in float16 or float64, or one that takes whole pixels, as the same network in float32.

float16 weights are float32 numbers exactly, so nothing of the file is lost; only the rounding between its layers goes.
float64 weights are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph.index import GraphIndex, reconnect

if TYPE_CHECKING:
    import onnx


def plain_types(model: onnx.ModelProto) -> str:
    """Change the model in place; what was changed, in words, or ""."""
    import onnx

    kinds = onnx.TensorProto
    other = {kinds.FLOAT16: "float16", kinds.DOUBLE: "float64"}
    values = [*model.graph.input, *model.graph.output]
    found = {tensor.data_type for tensor in model.graph.initializer} | {v.type.tensor_type.elem_type for v in values}
    done = [f"{other[kind]} is float32" for kind in other if kind in found]
    if done:
        for graph in _graphs(model.graph):
            _to_float32(graph, set(other))
    if _takes_pixels(model):
        done.append("the uint8 input is float32 (followed by a Cast)")
    return " and ".join(done)


def _to_float32(graph: onnx.GraphProto, kinds: set[int]) -> None:
    import onnx

    for tensor in graph.initializer:
        _tensor(tensor, kinds)
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("t"):
                _tensor(item.t, kinds)
            elif item.name in ("to", "dtype") and item.i in kinds:
                item.i = onnx.TensorProto.FLOAT
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in kinds:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del graph.value_info[:]


def _tensor(tensor: onnx.TensorProto, kinds: set[int]) -> None:
    import onnx

    if tensor.data_type in kinds:
        value = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


def _takes_pixels(model: onnx.ModelProto) -> bool:
    import onnx

    face = GraphIndex(model.graph).inputs()[0]
    kind = face.type.tensor_type
    if kind.elem_type != onnx.TensorProto.UINT8:
        return False
    whole = f"{face.name}_uint8"
    reconnect(model.graph, {face.name: whole})
    cast = onnx.helper.make_node("Cast", [face.name], [whole], name=whole, to=onnx.TensorProto.UINT8)
    model.graph.node.insert(0, cast)
    kind.elem_type = onnx.TensorProto.FLOAT
    return True


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and the bodies inside it."""
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for body in (*([item.g] if item.HasField("g") else []), *item.graphs):
                yield from _graphs(body)
