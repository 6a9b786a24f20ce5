"""Repairs a source model that InsightFace cannot run as it is, without changing its meaning.

The reference runs the repaired model; each repair follows the exporter's intent and the specification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.dynamic_batch import baked_reshapes, declared_batch, dynamic_batch
from arcface_build.graph.index import GraphIndex, attribute, reconnect, replace_nodes, shapes
from arcface_build.graph.plain_types import plain_types
from arcface_clients.contract import FACE_SIZE

if TYPE_CHECKING:
    import onnx


def repair_source(model: onnx.ModelProto) -> Step:
    """Fix known errors of old exporters, and normalise an NHWC input or an unspecified image size."""
    done = [
        text
        for text in (
            plain_types(model),
            _spatial_batchnorm(model),
            _flat_gemm(model),
            _channel_slopes(model),
            _image_size(model),
            _channels_first(model),
            _flat_output(model),
            _batch(model),
        )
        if text
    ]
    if done:
        model.ir_version = max(4, model.ir_version)  # from 4 on, weights need not be listed as inputs
    return Step("repair_source", model, bool(done), "; ".join(done) or "the file follows its specification")


def _spatial_batchnorm(model: onnx.ModelProto) -> str:
    """MXNet wrote spatial=0 but meant 1: scale has one number per channel, so no other reading is possible.

    https://github.com/onnx/models/issues/156, https://github.com/microsoft/onnxruntime/issues/2447
    """
    index, count = GraphIndex(model.graph), 0
    for node in model.graph.node:
        if node.op_type != "BatchNormalization" or attribute(node, "spatial", 1) != 0:
            continue
        scale = index.constant(node.input[1])
        if scale is None or scale.ndim != 1:
            continue
        for item in node.attribute:
            if item.name == "spatial":
                item.i = 1
                count += 1
    return f"BatchNormalization spatial=0 with one scale per channel set to spatial=1 ({count} nodes)" if count else ""


def _flat_gemm(model: onnx.ModelProto) -> str:
    """MXNet's FullyConnected flattens its input; ONNX's Gemm accepts rank 2 only.

    https://github.com/microsoft/onnxruntime/issues/2045
    """
    import onnx

    index, known, instead = GraphIndex(model.graph), shapes(model), {}
    for node in model.graph.node:
        if node.op_type != "Gemm" or index.constant(node.input[0]) is not None:
            continue
        rank = _rank(index, known, node.input[0])
        if rank is None or rank < 3:
            continue
        flat = f"{node.output[0]}_flat"
        flatten = onnx.helper.make_node("Flatten", [node.input[0]], [flat], axis=1)
        gemm = onnx.NodeProto()
        gemm.CopyFrom(node)
        gemm.input[0] = flat
        instead[node.output[0]] = [flatten, gemm]
    replace_nodes(model.graph, instead)
    return f"Flatten inserted before {len(instead)} Gemm with rank-4 input" if instead else ""


def _rank(index: GraphIndex, known: dict[str, list], name: str) -> int | None:
    """Rank of a tensor, even if inference gave up: BatchNormalization, PRelu and Dropout keep the rank."""
    for _ in range(8):
        if name in known:
            return len(known[name])
        maker = index.maker.get(name)
        if maker is None:
            return None
        if maker.op_type in ("Conv", "MaxPool", "AveragePool"):
            return 4
        if maker.op_type not in ("BatchNormalization", "PRelu", "Dropout", "Relu", "Identity"):
            return None
        name = maker.input[0]
    return None


def _channel_slopes(model: onnx.ModelProto) -> str:
    """MXNet wrote PRelu slopes as [C]; the specification reads those as columns, and runtimes reject the shape.

    https://github.com/microsoft/onnxruntime/issues/3205
    """
    index, known, count = GraphIndex(model.graph), shapes(model), 0
    for node in model.graph.node:
        if node.op_type != "PRelu" or node.input[1] not in index.initializers:
            continue
        slope = index.constant(node.input[1])
        shape = known.get(node.input[0])
        rank = len(shape) if shape else _rank(index, known, node.input[0])
        if slope is None or slope.ndim != 1 or slope.size == 1 or rank != 4:
            continue
        if shape and shape[3] == slope.size:
            continue  # valid as written: it really means columns
        node.input[1] = index.add_constant(f"{node.input[1]}_channels", slope.reshape(-1, 1, 1))
        count += 1
    return f"PRelu slopes [C] reshaped to [C,1,1] ({count} nodes)" if count else ""


def _image_size(model: onnx.ModelProto) -> str:
    """Set a height and width left open by the file to 112: InsightFace reads its crop size from them."""
    face = GraphIndex(model.graph).inputs()[0]
    dim = face.type.tensor_type.shape.dim
    if len(dim) != 4:
        return ""
    sides = (1, 2) if dim[3].dim_value == 3 else (2, 3)
    open_sides = [side for side in sides if dim[side].dim_value <= 0]
    for side in open_sides:
        dim[side].Clear()
        dim[side].dim_value = FACE_SIZE
    channels = 3 if dim[3].dim_value == 3 else 1
    if dim[channels].dim_value <= 0:
        dim[channels].Clear()
        dim[channels].dim_value = 3
    return f"open image size set to {FACE_SIZE}×{FACE_SIZE}" if open_sides else ""


def _channels_first(model: onnx.ModelProto) -> str:
    """Put a Transpose before an NHWC input (tf2onnx), so that it is fed like every other ArcFace model."""
    import onnx

    graph = model.graph
    face = GraphIndex(graph).inputs()[0]
    dim = face.type.tensor_type.shape.dim
    if len(dim) != 4 or dim[3].dim_value != 3 or dim[1].dim_value == 3:
        return ""
    inner = f"{face.name}_nhwc"
    reconnect(graph, {face.name: inner})
    nodes = [onnx.helper.make_node("Transpose", [face.name], [inner], perm=[0, 2, 3, 1]), *graph.node]
    rewritten = onnx.GraphProto()
    rewritten.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(rewritten.node)
    sizes = [3, dim[1].dim_value, dim[2].dim_value]
    for position, size in enumerate(sizes, start=1):
        dim[position].dim_value = size
    return "NHWC input changed to NCHW (Transpose inserted)"


def _flat_output(model: onnx.ModelProto) -> str:
    """Change an output [N,D,1,1] or [D] to [N,D]: the reference normalises along axis 1 of that."""
    import onnx

    output = model.graph.output[0]
    shape = shapes(model).get(output.name, [])
    if len(shape) == 1:
        return _row_output(model, shape[0])
    if len(shape) != 4:
        return ""
    flat = f"{output.name}_flat"
    model.graph.node.append(onnx.helper.make_node("Flatten", [output.name], [flat], axis=1))
    dim = next((size for size in shape[1:] if size != 1), None)
    output.CopyFrom(onnx.helper.make_tensor_value_info(flat, onnx.TensorProto.FLOAT, [shape[0], dim]))
    return "output [N,D,1,1] flattened to [N,D]"


def _row_output(model: onnx.ModelProto, dim: int | str | None) -> str:
    """Remove the last node of an export for one face if it takes the row out of [1,D]: the output is [N,D] again."""
    import onnx

    output, index = model.graph.output[0], GraphIndex(model.graph)
    last = index.maker[output.name]
    if last.op_type not in ("Gather", "Squeeze", "Reshape", "Flatten"):
        return ""
    rows = f"{output.name}_rows"
    shape = index.add_constant(f"{rows}_shape", np.array([-1, dim if isinstance(dim, int) else 0], np.int64))
    made = onnx.helper.make_node("Reshape", [last.input[0], shape], [rows], name=rows)
    replace_nodes(model.graph, {last.output[0]: [made]})
    batch = declared_batch(index.inputs()[0]) or 1
    output.CopyFrom(onnx.helper.make_tensor_value_info(rows, onnx.TensorProto.FLOAT, [batch, dim]))
    return "output [D] is [N,D]"


def _batch(model: onnx.ModelProto) -> str:
    """Make a batch dynamic that is fixed above 1, or declared dynamic in spite of a Reshape to 1.

    The reference runs any number of faces. A batch of exactly 1 stays, and the reference runs face by face.
    """
    batch = declared_batch(GraphIndex(model.graph).inputs()[0])
    if batch == 1 or (isinstance(batch, str) and not baked_reshapes(model)):
        return ""
    return dynamic_batch(model).why
