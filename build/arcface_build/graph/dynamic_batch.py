"""Makes the batch dynamic in a model whose batch is fixed, oddly named or baked into a Reshape."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.index import GraphIndex, attribute, shapes

if TYPE_CHECKING:
    import onnx

BATCH = "N"


def dynamic_batch(model: onnx.ModelProto) -> Step:
    """Name the first dimension of input and output `N`, and let each Reshape that fixes the batch copy it instead.

    Whether rows stay independent is proved later, by running the result (arcface_build.imports.proof).
    """
    graph = model.graph
    index = GraphIndex(graph)
    face = index.inputs()[0]
    batch = declared_batch(face)
    baked = baked_reshapes(model)
    for node in baked:
        shape = np.array(index.constant(node.input[1]))
        shape[0] = 0  # "as in the input": unlike −1 it cannot mix faces
        node.input[1] = index.add_constant(f"{node.output[0]}_shape", shape.astype(np.int64))
    for value in (face, *graph.output):
        dim = value.type.tensor_type.shape.dim
        if len(dim):
            dim[0].Clear()
            dim[0].dim_param = BATCH
    del graph.value_info[:]  # inferred for the old batch
    if batch == BATCH and not baked:
        return Step("dynamic_batch", model, False, "the batch is already dynamic")
    was = f"was fixed to {batch}" if isinstance(batch, int) else f"was {batch or 'unnamed'!r}"
    also = f", also in {len(baked)} Reshape" if baked else ""
    return Step("dynamic_batch", model, True, f"batch {was}{also}")


def declared_batch(face: onnx.ValueInfoProto) -> int | str:
    """The first dimension of the input as stated in the file; "" if not stated."""
    dim = face.type.tensor_type.shape.dim[0]
    return dim.dim_value if dim.dim_value > 0 else dim.dim_param


def baked_reshapes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The Reshape nodes that contain the batch as a number; looks for 1 if the input's batch is not a number."""
    known = shapes(model)
    index = GraphIndex(model.graph)
    batch = declared_batch(index.inputs()[0]) or 1
    fixed = batch if isinstance(batch, int) else 1
    return [node for node in model.graph.node if _holds_batch(index, known, node, fixed)]


def _holds_batch(index: GraphIndex, known: dict[str, list], node: onnx.NodeProto, batch: int) -> bool:
    """Whether the first number of a Reshape's shape is the batch (and does not merely look like it)."""
    if node.op_type != "Reshape" or index.constant(node.input[0]) is not None or attribute(node, "allowzero", 0):
        return False
    shape = index.constant(node.input[1])
    if shape is None or shape.size < 2 or shape[0] != batch:
        return False
    before, rest = known.get(node.input[0], [None]), list(shape[1:])
    if -1 in rest or 0 in rest or not all(isinstance(d, int) for d in before[1:]):
        return True
    return prod(before[1:]) == prod(rest)
