"""Strips `norm` and `contract` from a serving model, leaving only the network behind `embedding`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arcface_clients.contract import EMBEDDING_OUTPUT

if TYPE_CHECKING:
    import onnx


def embedding_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with only the nodes that `embedding` depends on, in the same order."""
    import onnx

    wanted, nodes = {EMBEDDING_OUTPUT}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            nodes.append(node)
            wanted |= set(node.input)
    graph = onnx.helper.make_graph(
        nodes[::-1],
        model.graph.name,
        list(model.graph.input),
        [output for output in model.graph.output if output.name == EMBEDDING_OUTPUT],
        [tensor for tensor in model.graph.initializer if tensor.name in wanted],
    )
    return onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
