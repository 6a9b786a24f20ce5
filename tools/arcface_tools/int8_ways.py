"""Ways to make an int8 network better or faster that were tried and are not in the product; see docs/variants.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph.index import GraphIndex, attribute, drop_unused, reconnect, sort_nodes
from arcface_build.variants.calibrate import BATCH, collect_histograms, conv_inputs, least_error_range
from arcface_build.variants.int8 import Range, quantizable_layers, quantize_convolutions
from arcface_clients.arrays import Array, FaceArray, FloatArray
from arcface_clients.engines.runtimes import open_session

if TYPE_CHECKING:
    import onnx

_SMALLEST = 1e-5  # of a channel's largest value: dead channels are not scaled up without end
_LARGEST_FACTOR = 100.0


def calibrated(model: onnx.ModelProto, tensors: Sequence[str], faces: FaceArray) -> dict[str, Range]:
    """The range of each tensor with the least squared error over `faces`, as the product chooses it."""
    return {name: least_error_range(h, "cpu") for name, h in collect_histograms(model, tensors, faces).items()}


def bias_corrected(quantized: onnx.ModelProto, model: onnx.ModelProto, faces: FaceArray) -> onnx.ModelProto:
    """The quantised model with the mean error of each of its convolutions, by channel, added to its bias.

    Each convolution's error is measured on float inputs: its float original stands beside it and feeds the rest.
    """
    errors = _mean_errors(quantized, model, faces)
    corrected = _copied(quantized)
    index = GraphIndex(corrected.graph)
    for node in corrected.graph.node:
        if node.name in errors:
            bias = index.constant(node.input[2]) if len(node.input) > 2 else None
            value = (errors[node.name] + (0 if bias is None else bias)).astype(np.float32)
            node.input[2:] = [index.add_constant(f"{node.name}.corrected", value)]
    drop_unused(corrected.graph)
    return corrected


def equalized(model: onnx.ModelProto, faces: FaceArray, share: float = 0.5) -> tuple[onnx.ModelProto, int]:
    """The same function with channels scaled so that quantised tensors are more even; and how many tensors are.

    A channel that a convolution alone reads is divided by max|x|^share / max|w|^(1 − share), where x are its values and
    w the weights that read it; what makes it is a BatchNormalization, or a convolution before a PRelu, Relu or nothing,
    which are homogeneous. (share = 0.5 is the middle between quantising activations and weights well.)
    """
    made = _copied(model)
    index = GraphIndex(made.graph)
    pairs = [
        (conv, source)
        for conv in made.graph.node
        if conv.op_type == "Conv" and attribute(conv, "group", 1) == 1 and index.constant(conv.input[1]) is not None
        if (source := _scalable(index, conv)) is not None
    ]
    if not pairs:
        return made, 0
    largest = _largest_by_channel(model, [conv.input[0] for conv, _ in pairs], faces)
    for conv, source in pairs:
        weight = _constant(index, conv.input[1])
        seen = largest[conv.input[0]].clip(_SMALLEST)
        factor = seen**share / np.abs(weight).max(axis=(0, 2, 3)).clip(_SMALLEST) ** (1 - share)
        factor = (factor / np.exp(np.log(factor).mean())).clip(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
        _replace(index, conv, 1, weight * factor[None, :, None, None])
        for place in (1, 2)[: len(source.input) - 1]:  # scale and shift, or weight and bias
            value = _constant(index, source.input[place])
            _replace(index, source, place, value / factor.reshape(-1, *[1] * (value.ndim - 1)))
    return made, len(pairs)


def sums_in_int8(quantized: onnx.ModelProto, model: onnx.ModelProto, faces: FaceArray) -> onnx.ModelProto:
    """The quantised model with the residual stream in int8 too: each sum is rounded before anything reads it."""
    from onnx import numpy_helper
    from onnx.helper import make_node

    sums = [node.output[0] for node in model.graph.node if node.op_type == "Add"]
    made = _copied(quantized)
    for name, (low, high) in calibrated(model, sums, faces).items():
        scale, grid = (high - low) / 255, [f"{name}.scale", f"{name}.zero"]
        made.graph.initializer.extend(  # scalars: one for the whole tensor
            [
                numpy_helper.from_array(np.array(scale, np.float32), grid[0]),
                numpy_helper.from_array(np.array(round(-low / scale), np.uint8), grid[1]),
            ]
        )
        for node in made.graph.node:
            node.input[:] = [f"{name}.rounded" if read == name else read for read in node.input]
        made.graph.node.append(make_node("QuantizeLinear", [name, *grid], [f"{name}.levels"], name=f"{name}.q"))
        made.graph.node.append(
            make_node("DequantizeLinear", [f"{name}.levels", *grid], [f"{name}.rounded"], name=f"{name}.dq")
        )
    sort_nodes(made.graph)
    return made


def weights_in_int8(model: onnx.ModelProto, keep: Sequence[str]) -> onnx.ModelProto:
    """The model with activations in float, and weights rounded as in int8 except in the convolutions of `keep`."""
    made = _copied(model)
    index = GraphIndex(made.graph)
    for name in quantizable_layers(made):
        node = next(node for node in made.graph.node if node.name == name)
        if name not in keep:
            weight = _constant(index, node.input[1])
            step = np.abs(weight).max(axis=(1, 2, 3), keepdims=True).clip(1e-12) / 127
            node.input[1] = index.add_constant(f"{name}.rounded", (np.rint(weight / step) * step).astype(np.float32))
    drop_unused(made.graph)
    return made


def convolutions_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every convolution but the first in int8, and no PRelu, BatchNormalization or sum: wrong, but as fast as can be.

    What it reads and writes is int8 throughout, so this is what these convolutions cost in a runtime by themselves.
    """
    bare = _copied(model)
    between = {n.output[0]: n.input[0] for n in bare.graph.node if n.op_type in ("PRelu", "BatchNormalization", "Add")}
    reconnect(bare.graph, between)
    drop_unused(bare.graph)
    return quantize_convolutions(
        bare, dict.fromkeys(conv_inputs(bare), (-1.0, 1.0)), "cpu", quantizable_layers(bare)[:1]
    )


def _mean_errors(quantized: onnx.ModelProto, model: onnx.ModelProto, faces: FaceArray) -> dict[str, FloatArray]:
    import onnx
    from onnx.helper import make_node

    beside = _copied(quantized)
    known = {i.name for i in beside.graph.initializer}
    beside.graph.initializer.extend(i for i in model.graph.initializer if i.name not in known)
    floats = {node.name: node for node in model.graph.node}
    convolutions = [n for n in beside.graph.node if n.op_type == "Conv" and n.name in floats]
    layers = [node.name for node in convolutions if list(node.input) != list(floats[node.name].input)]
    added: list[onnx.NodeProto] = []
    for node in beside.graph.node:
        if node.name in layers:
            exact = onnx.NodeProto()
            exact.CopyFrom(floats[node.name])
            exact.name, node.output[0] = f"{node.name}.float", f"{node.name}.coarse"
            added += [
                exact,
                make_node("Sub", [exact.output[0], node.output[0]], [f"{node.name}.error"]),
                make_node("GlobalAveragePool", [f"{node.name}.error"], [f"{node.name}.mean"]),
            ]
    beside.graph.node.extend(added)
    sort_nodes(beside.graph)
    means = [f"{name}.mean" for name in layers]
    found = _over(beside, means, faces, lambda value: value.sum(axis=0), np.add)
    return {name: found[f"{name}.mean"].reshape(-1) / len(faces) for name in layers}


def _largest_by_channel(model: onnx.ModelProto, tensors: Sequence[str], faces: FaceArray) -> dict[str, FloatArray]:
    return _over(model, tensors, faces, lambda value: np.abs(value).max(axis=(0, 2, 3)), np.maximum)


def _over(
    model: onnx.ModelProto,
    names: Sequence[str],
    faces: FaceArray,
    reduce: Callable[[Array], Array],
    join: Callable[[Array, Array], Array],
) -> dict[str, Array]:
    """Each tensor over all faces, reduced batch by batch."""
    import onnx

    watched = _copied(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_session(watched)
    found: dict[str, Array] = {}
    for start in range(0, len(faces), BATCH):
        values = session.run(list(names), {session.get_inputs()[0].name: faces[start : start + BATCH]})
        for name, value in zip(names, values, strict=True):
            found[name] = join(found[name], reduce(value)) if name in found else reduce(value)
    return found


def _scalable(index: GraphIndex, conv: onnx.NodeProto) -> onnx.NodeProto | None:
    """The node that makes this convolution's channels and can scale them; None if others would notice."""
    tensor = conv.input[0]
    while index.only_user(tensor) is not None and (source := index.maker.get(tensor)) is not None:
        if source.op_type in ("BatchNormalization", "Conv"):
            return source if all(index.constant(name) is not None for name in source.input[1:3]) else None
        if source.op_type not in ("PRelu", "Relu"):
            return None
        tensor = source.input[0]
    return None


def _constant(index: GraphIndex, name: str) -> Array:
    value = index.constant(name)
    assert value is not None
    return value


def _replace(index: GraphIndex, node: onnx.NodeProto, place: int, value: Array) -> None:
    node.input[place] = index.add_constant(f"{node.name}.even{place}", value.astype(np.float32))


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy
