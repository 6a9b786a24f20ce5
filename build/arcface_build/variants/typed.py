"""Makes an fp16 typed ONNX: the body of the graph in float16, inputs and outputs unchanged.

Kept in float32: everything before the first convolution (pixels) and after the last one (final BN, FC, L2 norm),
anything that would overflow, and what a recipe keeps. In an int8 model the scales of quantised convolutions become
float16 with the body (ONNX allows that from opset 19 on), so that nothing between two of them is float32.
onnxconverter-common 1.16 cannot do this: a graph that begins
with Cast(uint8 → float) becomes invalid, and blocking the last node still makes the output float16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from arcface_clients.engines.runtimes import open_session

if TYPE_CHECKING:
    import onnx

FLOAT16_MAX = 65504.0
HEADROOM = 4.0  # faces outside the calibration set reach larger values


def body_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes from the first to the last convolution: all that are on a path between two of them."""
    after: set[str] = set()  # tensors that depend on a convolution
    for node in model.graph.node:
        if node.op_type == "Conv" or after.intersection(node.input):
            after.update(node.output)
    before: set[str] = set()  # tensors that a convolution depends on
    for node in reversed(model.graph.node):
        if node.op_type == "Conv" or before.intersection(node.output):
            before.update(node.input)
    return [
        n.name
        for n in model.graph.node
        if n.op_type == "Conv" or (after.intersection(n.output) and before.intersection(n.output))
    ]


def half_nodes(model: onnx.ModelProto, keep: Collection[str] = ()) -> set[str]:
    """Names of the nodes that compute in float16: the body without `keep`, and what dequantises for it alone."""
    half = set(body_nodes(model)) - set(keep)
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and readers.get(node.output[0], {""}) <= half:
            half.add(node.name)
    return half


def with_followers(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Each convolution of the body with the body nodes after it in graph order, up to the next convolution.

    Keeping a convolution in float32 is worth little while the sums and activations after it are rounded.
    """
    inside, groups = set(body_nodes(model)), dict[str, list[str]]()
    for node in model.graph.node:
        if node.name in inside:
            if node.op_type == "Conv":
                groups[node.name] = []
            groups[next(reversed(groups))].append(node.name)
    return groups


def overflowing(model: onnx.ModelProto, largest: Mapping[str, float]) -> list[str]:
    """Names of body nodes that touch a tensor whose largest observed magnitude comes close to float16's maximum."""
    limit = FLOAT16_MAX / HEADROOM
    hot = {name for name, value in largest.items() if not value < limit}
    inside = set(body_nodes(model))
    return [n.name for n in model.graph.node if n.name in inside and hot.intersection([*n.input, *n.output])]


def largest_values(
    model: onnx.ModelProto,
    nodes: Collection[str],
    faces: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Largest magnitude of each output of the named nodes, over faces uint8 (N,112,112,3) BGR; NaN stays NaN."""
    import onnx

    names = [o for n in model.graph.node if n.name in set(nodes) for o in n.output]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    session = open_session(watched)
    largest = dict.fromkeys(names, 0.0)
    for done, face in enumerate(faces, 1):  # one at a time: every tensor of the network is an output
        for name, value in zip(names, session.run(names, {session.get_inputs()[0].name: face[None]}), strict=True):
            largest[name] = float(np.maximum(largest[name], np.abs(value).max()))
        if progress:
            progress(done, len(faces))
    return largest


def to_float16(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of `model` whose body, except for the nodes in `keep`, computes in float16.

    Args:
        model: serving ONNX or its int8 form (then of opset 19 or newer), every node named.
        keep: names of body nodes that stay float32.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    half = half_nodes(model, keep)
    weights = {i.name: i for i in model.graph.initializer}
    floats = _float_tensors(model)
    produced_half = {o for n in model.graph.node if n.name in half for o in n.output}
    nodes: list[onnx.NodeProto] = []
    made: dict[tuple[str, int], str] = {}
    halved: dict[str, onnx.TensorProto] = {}

    def as_type(name: str, want_half: bool) -> str:
        """The name under which tensor `name` is available in the wanted type; a Cast is added on first use."""
        if name not in floats or (name in produced_half) == want_half:
            return name
        if name in weights:  # no node produces it, so it is float32 and needed as float16
            array = numpy_helper.to_array(weights[name]).clip(-FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
            halved[name] = numpy_helper.from_array(array, f"{name}.fp16")
            return f"{name}.fp16"
        to = TensorProto.FLOAT16 if want_half else TensorProto.FLOAT
        if (name, to) not in made:
            made[name, to] = f"{name}.{'fp16' if want_half else 'fp32'}"
            nodes.append(helper.make_node("Cast", [name], [made[name, to]], name=f"cast.{made[name, to]}", to=to))
        return made[name, to]

    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [as_type(name, node.name in half) for name in node.input]
        nodes.append(copy)
    return _rewritten(model, nodes, weights, halved)


def rounded_as_float16(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A float32 model that simulates `to_float16(model, keep)`: each result of its body is rounded to float16.

    For judging on a CPU: there ONNX Runtime computes float16 nodes in float32 without rounding in between, so the typed
    file itself would show too little drift and never overflow.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    half = half_nodes(model, keep)
    weights = {i.name: i for i in model.graph.initializer}
    floats = _float_tensors(model)
    rounded: dict[str, str] = {}
    extra: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []

    def round_tensor(name: str) -> str:
        if name not in floats:
            return name
        if name not in rounded:
            rounded[name] = f"{name}.rounded"
            if name in weights:
                with np.errstate(over="ignore"):
                    array = numpy_helper.to_array(weights[name]).astype(np.float16).astype(np.float32)
                extra[name] = numpy_helper.from_array(array, rounded[name])
            else:
                nodes.append(helper.make_node("Cast", [name], [f"{name}.fp16"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}.fp16"], [rounded[name]], to=TensorProto.FLOAT))
        return rounded[name]

    made_in_half: set[str] = set()
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        wants = node.name in half
        copy.input[:] = [round_tensor(i) if wants or i in made_in_half else i for i in node.input]
        nodes.append(copy)
        if wants:
            made_in_half.update(node.output)
    return _rewritten(model, nodes, weights, extra)


def _rewritten(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
    made: Mapping[str, onnx.TensorProto],
) -> onnx.ModelProto:
    """The model with these nodes, the weights that they still read, and the new ones."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    used = {name for node in nodes for name in node.input}
    del copy.graph.node[:], copy.graph.initializer[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(weight for name, weight in weights.items() if name in used)
    copy.graph.initializer.extend(made.values())
    return copy


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors, weights included."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    floats = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return floats | {i.name for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
