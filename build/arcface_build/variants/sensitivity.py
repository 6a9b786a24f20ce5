"""Measures how much drift each layer causes when it alone is in low precision.

For each layer only the part of the network after it is run: activations at every point where the network is a single
tensor wide (each residual sum) are computed once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph.embedding_only import embedding_only
from arcface_build.imports.proof import OnCount
from arcface_clients.engines.runtimes import open_session
from arcface_clients.evidence.drift import compare_embeddings

if TYPE_CHECKING:
    import onnx


def measure_sensitivities(
    model: onnx.ModelProto,
    layers: Iterable[str],
    coarsen: Callable[[onnx.ModelProto, str], None],
    faces: np.ndarray,
    progress: OnCount | None = None,
) -> dict[str, float]:
    """Mean drift (1 − cosine) of the embedding when one layer alone is coarse, for each layer.

    Args:
        model: serving ONNX.
        layers: names of nodes, in graph order.
        coarsen: changes the named layer of a part of the model to low precision, in place.
        faces: uint8 (N,112,112,3) BGR; a handful is enough, as the drift of one layer varies little between faces.
        progress: called with (layers done, all).
    """
    layers = list(layers)
    model = embedding_only(model)
    output = model.graph.output[0].name
    starts = _start_before_each(model)
    wanted = sorted({starts[layer] for layer in layers} - {model.graph.input[0].name})
    kept, reference = _activations(model, [*wanted, output], faces)
    kept[model.graph.input[0].name] = faces
    drift: dict[str, float] = {}
    for done, layer in enumerate(layers, 1):
        start = starts[layer]
        part = part_from(model, start)
        coarsen(part, layer)
        session = open_session(part)
        value = session.run(None, {start: kept[start]})[0]
        drift[layer] = max(0.0, 1 - compare_embeddings(reference, value).mean_cosine)
        if progress:
            progress(done, len(layers))
    return drift


def part_from(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """A copy of everything after `tensor`, which becomes its input: one of `cut_tensors`, or the model's input."""
    import onnx

    if tensor == model.graph.input[0].name:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        return whole
    nodes = list(model.graph.node)
    first = next(i for i, n in enumerate(nodes) if tensor in n.output) + 1
    used = {name for node in nodes[first:] for name in node.input}
    graph = onnx.helper.make_graph(
        nodes[first:],
        model.graph.name,
        [onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)],
        list(model.graph.output),
        [i for i in model.graph.initializer if i.name in used],
    )
    return onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def cut_tensors(model: onnx.ModelProto) -> list[str]:
    """Tensors through which everything passes from the nodes before to the nodes after, in graph order."""
    constants = {i.name for i in model.graph.initializer}
    last_use: dict[str, int] = {}
    for position, node in enumerate(model.graph.node):
        for name in node.input:
            last_use[name] = position
    live: set[str] = {model.graph.input[0].name}
    cuts = []
    for position, node in enumerate(model.graph.node):
        live.update(o for o in node.output if last_use.get(o, -1) > position)
        live = {name for name in live if last_use[name] > position} - constants
        if len(live) == 1 and next(iter(live)) in node.output:
            cuts.append(next(iter(live)))
    return cuts


def _start_before_each(model: onnx.ModelProto) -> dict[str, str]:
    """The last cut tensor before each node, or the input of the model.

    Only cuts after the first convolution count: they are float and small enough to keep.
    """
    cuts, start, seen_conv = set(cut_tensors(model)), model.graph.input[0].name, False
    starts: dict[str, str] = {}
    for node in model.graph.node:
        starts[node.name] = start
        seen_conv = seen_conv or node.op_type == "Conv"
        cut = cuts.intersection(node.output)
        if seen_conv and cut:
            start = next(iter(cut))
    return starts


def _activations(
    model: onnx.ModelProto, names: list[str], faces: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Values of the named tensors over all faces, and the embeddings (the last name)."""
    import onnx

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names[:-1])
    values = open_session(watched).run(names, {model.graph.input[0].name: faces})
    return dict(zip(names[:-1], values[:-1], strict=True)), values[-1]
