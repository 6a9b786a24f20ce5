"""Lookups over a graph: the producer and consumers of each tensor, and which tensors are constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


class GraphIndex:
    """Lookups over one graph. Build a new one after adding or removing nodes; constants stay up to date."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        """Read the graph once; O(nodes)."""
        self.graph = graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output if name}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in [*node.input, *captured(node)]:
                self.users.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self._constant = set(self.initializers)
        for node in graph.node:
            if _is_constant(node, self._constant):
                self._constant.update(node.output)

    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Graph inputs that a caller must feed: files of IR version 3 also list their weights as inputs."""
        return [value for value in self.graph.input if value.name not in self.initializers]

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer, or of a tensor computed from constants alone; None for anything else."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        if name in self.initializers:
            return onnx.numpy_helper.to_array(self.initializers[name])
        if name not in self._constant:
            return None
        node = self.maker[name]
        if node.op_type == "Constant" and node.attribute[0].name != "value":
            return np.asarray(onnx.helper.get_attribute_value(node.attribute[0]))
        feeds = {source: self.constant(source) for source in node.input if source}
        if any(value is None for value in feeds.values()):
            return None
        try:
            values: Any = ReferenceEvaluator(node).run(None, feeds)
        except Exception:  # an operator unknown to the evaluator is computed at run time
            return None
        return np.asarray(values[list(node.output).index(name)])

    def only_user(self, name: str) -> onnx.NodeProto | None:
        """The only node that reads this tensor; None if several or none do, or if it is a graph output."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def add_constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer under an unused name, and return that name."""
        import onnx

        free, count = name, 1
        while free in self.initializers or free in self.maker:
            free, count = f"{name}_{count}", count + 1
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(value), free)
        self.graph.initializer.append(tensor)
        self.initializers[free] = self.graph.initializer[-1]
        return free


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """What the bodies of an If, Loop or Scan read; their own tensors are among it."""
    for item in node.attribute:
        for graph in (item.g, *item.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from captured(inner)


def _is_constant(node: onnx.NodeProto, constants: set[str]) -> bool:
    import onnx

    if node.op_type == "Constant":
        return bool(node.attribute)
    known = bool(node.input) and all(name in constants for name in node.input if name)
    drawn = node.op_type.startswith(("Random", "Bernoulli", "Multinomial"))
    return known and not drawn and all(item.type != onnx.AttributeProto.GRAPH for item in node.attribute)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or `default` if it is not set."""
    import onnx

    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def shapes(model: onnx.ModelProto) -> dict[str, list[int | str | None]]:
    """Inferred shape of each tensor: int if known, else the symbol's name or None.

    Large weights are stripped before inference: only their shapes matter, and inference copies the model.
    """
    import onnx

    light = onnx.ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    graph = light.graph
    graph.name = "shapes"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    listed = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if len(tensor.dims) <= 1 and sum(tensor.dims) <= 64:  # shapes, axes, indices: inference reads their values
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    try:
        graph = onnx.shape_inference.infer_shapes(light).graph
    except onnx.shape_inference.InferenceError:  # a graph that violates its specification still has declared shapes
        graph = light.graph
    known = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        if value.type.tensor_type.HasField("shape"):
            known[value.name] = [_dim(dim) for dim in value.type.tensor_type.shape.dim]
    return known


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return dim.dim_value
    return dim.dim_param or None


def replace_nodes(graph: onnx.GraphProto, instead: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Replace nodes, identified by their first output, with other nodes (none, one or several)."""
    import onnx

    rewritten = onnx.GraphProto()
    for node in graph.node:
        rewritten.node.extend(instead.get(node.output[0], [node]))
    del graph.node[:]
    graph.node.extend(rewritten.node)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node after those that make its inputs, and as near before its first reader as the order allows."""
    maker = {name: position for position, node in enumerate(graph.node) for name in node.output if name}
    order: dict[int, None] = {}

    def place(position: int) -> None:
        if position not in order:
            node = graph.node[position]
            for name in [*node.input, *captured(node)]:
                if maker.get(name, position) != position:
                    place(maker[name])
            order[position] = None

    for position in range(len(graph.node)):
        place(position)
    nodes = [graph.node[position] for position in order]
    ordered = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(ordered)


def reconnect(graph: onnx.GraphProto, instead: Mapping[str, str]) -> None:
    """Let every node that reads tensor `old` read `instead[old]`, bodies of If and Loop too; chains are followed."""
    for node in graph.node:
        for position, name in enumerate(node.input):
            while name in instead:
                name = instead[name]
            node.input[position] = name
        for item in node.attribute:
            for body in (item.g, *item.graphs):
                reconnect(body, instead)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output depends on, and inputs that are weights (IR version 3)."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input, captured(node))
            kept.append(node.output[0])
    alive = set(kept)
    replace_nodes(graph, {node.output[0]: [] for node in graph.node if node.output[0] not in alive})
    weights = {tensor.name for tensor in graph.initializer}
    for field, gone in (
        (graph.input, lambda value: value.name in weights),
        (graph.initializer, lambda tensor: tensor.name not in needed),
    ):
        for position in reversed([i for i, item in enumerate(field) if gone(item)]):
            del field[position]
