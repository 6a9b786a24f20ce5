"""Constants: a model in, the same with what does not depend on the face computed once, and no-op nodes gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.index import GraphIndex, drop_unused, reconnect, replace_nodes

if TYPE_CHECKING:
    import onnx

NO_OPS = ("Identity", "Dropout")  # Dropout is one at inference; training graphs are refused before


def fold_constants(model: onnx.ModelProto) -> Step:
    """Turn Constant nodes and all that follows from constants alone into initializers; drop Identity and Dropout."""
    graph = model.graph
    index = GraphIndex(graph)
    folded, dropped, gone = 0, 0, {}
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in NO_OPS and index.constant(node.input[0]) is None and node.output[0] not in index.outputs:
            renamed[node.output[0]] = node.input[0]
            gone[node.output[0]] = []
            dropped += 1
            continue
        values = _constant_result(index, node)
        if values is None:
            continue
        gone[node.output[0]] = []
        folded += 1
        for name, value in zip(node.output, values, strict=False):
            if name:
                del index.maker[name]
                index.add_constant(name, value)
    replace_nodes(graph, gone)
    reconnect(graph, renamed)
    drop_unused(graph)
    why = f"{folded} constant nodes are weights now, {dropped} Identity or Dropout nodes dropped"
    return Step("fold_constants", model, bool(folded or dropped), why if folded or dropped else "nothing to fold")


def _constant_result(index: GraphIndex, node: onnx.NodeProto) -> list[np.ndarray] | None:
    """The outputs of a node all of whose inputs are constant, None where one is not or the node has a subgraph."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    if node.op_type == "Constant":
        value = index.constant(node.output[0])
        return None if value is None else [value]
    if not node.input or any(item.type == onnx.AttributeProto.GRAPH for item in node.attribute):
        return None
    feeds = {name: index.constant(name) for name in node.input if name}
    if any(value is None for value in feeds.values()):
        return None
    try:
        return [np.asarray(value) for value in ReferenceEvaluator(node).run(None, feeds)]
    except Exception:  # an operator that the evaluator lacks stays in the graph and is computed at run time
        return None
