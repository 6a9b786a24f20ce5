"""A part of a graph as a model of its own: what its input must go through to become the tensors that are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arcface_build.graph.index import GraphIndex, captured

if TYPE_CHECKING:
    import onnx


def ancestors(index: GraphIndex, ends: list[str]) -> list[onnx.NodeProto]:
    """The nodes that these tensors depend on, in the graph's order."""
    needed, todo = set(ends), list(ends)
    while todo:
        node = index.maker.get(todo.pop())
        if node is not None:
            new = {*node.input, *captured(node)} - needed
            needed |= new
            todo.extend(new)
    return [node for node in index.graph.node if needed.intersection(node.output)]


def cut_out(model: onnx.ModelProto, index: GraphIndex, ends: list[str]) -> onnx.ModelProto:
    """The model up to these tensors, with the weights of that part only; a runtime finds the types of its outputs."""
    import onnx

    nodes = ancestors(index, ends)
    cut = onnx.ModelProto(ir_version=max(4, model.ir_version))
    cut.opset_import.extend(model.opset_import)
    cut.functions.extend(model.functions)
    cut.graph.name = "part"
    cut.graph.node.extend(nodes)
    cut.graph.input.extend(index.inputs())
    cut.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(ends))
    read = {name for node in nodes for name in (*node.input, *captured(node))}
    cut.graph.initializer.extend(index.initializers[name] for name in sorted(read) if name in index.initializers)
    return cut
