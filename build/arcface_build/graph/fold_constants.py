"""Constant folding: precomputes everything that does not depend on the face, and removes no-op nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arcface_build.graph import Step
from arcface_build.graph.index import GraphIndex, drop_unused, reconnect, replace_nodes

if TYPE_CHECKING:
    import onnx

NO_OPS = ("Identity", "Dropout")  # Dropout is a no-op at inference; training graphs are refused earlier


def fold_constants(model: onnx.ModelProto) -> Step:
    """Turn Constant nodes and everything computed from constants into initializers; drop Identity and Dropout."""
    graph = model.graph
    index = GraphIndex(graph)
    folded, dropped = 0, 0
    gone: dict[str, list[onnx.NodeProto]] = {}
    renamed: dict[str, str] = {}
    for node in graph.node:
        name = node.output[0]
        value = index.constant(name)
        if value is not None and len(node.output) == 1:
            del index.maker[name]
            index.add_constant(name, value)
            folded += 1
        elif node.op_type in NO_OPS and name not in index.outputs:
            renamed[name] = node.input[0]
            dropped += 1
        else:
            continue
        gone[name] = []
    replace_nodes(graph, gone)
    reconnect(graph, renamed)
    drop_unused(graph)
    why = f"{folded} constant nodes turned into weights, {dropped} Identity or Dropout nodes dropped"
    return Step("fold_constants", model, bool(folded or dropped), why if folded or dropped else "nothing to fold")
