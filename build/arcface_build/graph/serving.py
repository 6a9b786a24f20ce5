"""Turns a network with float NCHW input into a serving model, from uint8 BGR crops to unit embeddings.

face uint8 [N,112,112,3] BGR → Cast → Transpose → (x − mean) / std → network → L2 → embedding float32 [N,D], its
length before that as norm float32 [N,1], and the contract id as contract int32 [N,4].
The channel order costs nothing: the first convolution's input channels are reversed. Mean and std stay as two separate
nodes: folded into a padded convolution they would be wrong at the border, and weights 127 times smaller lose bits in
fp16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.index import GraphIndex, attribute, drop_unused, reconnect
from arcface_build.graph.upgrade_opset import opset_of
from arcface_clients.contract import (
    CONTRACT_OUTPUT,
    EMBEDDING_OUTPUT,
    FACE_INPUT,
    FACE_SHAPE,
    NORM_OUTPUT,
    OUTPUTS,
    Preprocessing,
    contract_words,
)

if TYPE_CHECKING:
    import onnx

SMALLEST_NORM = 1e-6  # a zero embedding stays zero instead of NaN; representable in fp16
BATCH = "N"
SERVING_NAME = "arcface_serving"  # graph name by which an import recognises its own product


def serving_form(model: onnx.ModelProto, preprocessing: Preprocessing, dim: int, contract: str) -> Step:
    """Add preprocessing before and L2 normalisation after the network, with names and shapes of the tensor contract.

    Args:
        model: a network from float NCHW to raw embeddings; changed in place.
        preprocessing: what the network expects.
        dim: D.
        contract: the contract id that its responses carry.
    """
    import onnx

    graph = model.graph
    _free_names(graph)
    source = GraphIndex(graph).inputs()[0].name
    turned = preprocessing.color == "bgr" or _turn_first_conv(graph, source)
    front = _front(graph, source, preprocessing, gather=not turned)
    back = [*_back(graph, opset_of(model)), *_name_itself(graph, contract)]
    body = onnx.GraphProto()
    body.node.extend([*front, *graph.node, *back])
    del graph.node[:]
    graph.node.extend(body.node)
    del graph.input[:], graph.output[:], graph.value_info[:]
    graph.input.append(onnx.helper.make_tensor_value_info(FACE_INPUT, onnx.TensorProto.UINT8, [BATCH, *FACE_SHAPE]))
    kinds = {EMBEDDING_OUTPUT: (1, dim), NORM_OUTPUT: (1, 1), CONTRACT_OUTPUT: (6, 4)}  # FLOAT, FLOAT, INT32
    for name in OUTPUTS:
        kind, width = kinds[name]
        graph.output.append(onnx.helper.make_tensor_value_info(name, kind, [BATCH, width]))
    graph.name = SERVING_NAME
    drop_unused(graph)
    order = "none needed" if preprocessing.color == "bgr" else "first Conv's weights" if turned else "Gather"
    return Step("serving_form", model, True, f"uint8 BGR in, unit rows out; channel order: {order}")


def _front(graph: onnx.GraphProto, source: str, preprocessing: Preprocessing, gather: bool) -> list[onnx.NodeProto]:
    """Nodes from `face` to the tensor that was the source's input."""
    from onnx.helper import make_node

    index = GraphIndex(graph)
    # If the first Conv was reversed, the tensor before it is BGR and so are its constants.
    backwards = preprocessing.color == "rgb" and not gather
    nodes = [make_node("Cast", [FACE_INPUT], ["face_float"], to=1, name="face_float")]
    nodes.append(make_node("Transpose", ["face_float"], ["face_nchw"], perm=[0, 3, 1, 2], name="face_nchw"))
    if gather:
        order = index.add_constant("face_rgb_order", np.array([2, 1, 0], np.int64))
        nodes.append(make_node("Gather", ["face_nchw", order], ["face_rgb"], axis=1, name="face_rgb"))
    for op, values, neutral in (("Sub", preprocessing.mean, 0.0), ("Div", preprocessing.std, 1.0)):
        if set(values) == {neutral}:
            continue
        number = np.asarray(values[::-1] if backwards else values, np.float32)
        number = number[:1] if len(set(values)) == 1 else number.reshape(1, 3, 1, 1)
        label = "face_centred" if op == "Sub" else "face_scaled"
        nodes.append(
            make_node(op, [nodes[-1].output[0], index.add_constant(f"{label}_by", number)], [label], name=label)
        )
    nodes[-1].output[0] = source
    return nodes


def _back(graph: onnx.GraphProto, opset: int) -> list[onnx.NodeProto]:
    """Nodes from the source's output to unit rows, with a Flatten if that is [N,D,1,1]."""
    from onnx.helper import make_node

    index = GraphIndex(graph)
    raw = graph.output[0].name
    floor = index.add_constant("smallest_norm", np.asarray([SMALLEST_NORM], np.float32))
    if opset >= 18:  # ReduceL2 takes its axes as an input from opset 18 on
        axes = index.add_constant("embedding_axis", np.array([1], np.int64))
        norm = make_node("ReduceL2", ["embedding_raw", axes], [NORM_OUTPUT], keepdims=1, name="embedding_norm")
    else:
        norm = make_node("ReduceL2", ["embedding_raw"], [NORM_OUTPUT], axes=[1], keepdims=1, name="embedding_norm")
    return [
        make_node("Flatten", [raw], ["embedding_raw"], axis=1, name="embedding_raw"),
        norm,
        make_node("Max", [NORM_OUTPUT, floor], ["embedding_length"], name="embedding_length"),
        make_node("Div", ["embedding_raw", "embedding_length"], [EMBEDDING_OUTPUT], name=EMBEDDING_OUTPUT),
    ]


def _name_itself(graph: onnx.GraphProto, contract: str) -> list[onnx.NodeProto]:
    """Nodes that repeat the contract's words for each face: one of two equal rows, by whether its norm is above 0.

    So neither the shape nor the values of `face` are asked. For a shape, OpenVINO reads the batch size off the first
    convolution, which it then computes apart from its bias and activation; for values, it converts all pixels apart.
    """
    from onnx.helper import make_node

    index = GraphIndex(graph)
    words = index.add_constant("contract_words", contract_words(contract).reshape(1, 4))
    zero = index.add_constant("contract_zero", np.array(0, np.float32))
    flat = index.add_constant("contract_flat", np.array([-1], np.int64))
    return [
        make_node("Concat", [words, words], ["contract_table"], axis=0, name="contract_table"),
        make_node("Greater", [NORM_OUTPUT, zero], ["contract_choice"], name="contract_choice"),
        make_node("Cast", ["contract_choice"], ["contract_number"], to=6, name="contract_number"),
        make_node("Reshape", ["contract_number", flat], ["contract_row"], name="contract_row"),
        make_node("Gather", ["contract_table", "contract_row"], [CONTRACT_OUTPUT], axis=0, name=CONTRACT_OUTPUT),
    ]


def _turn_first_conv(graph: onnx.GraphProto, source: str) -> bool:
    """Reverse the input channels of the Conv that the input reaches through per-pixel arithmetic alone."""
    index = GraphIndex(graph)
    name, constants = source, []
    while (node := index.only_user(name)) is not None and node.op_type in ("Sub", "Add", "Mul", "Div"):
        position = 0 if index.constant(node.input[0]) is not None else 1
        value = index.constant(node.input[position])
        if value is None or value.size not in (1, 3):
            return False
        if value.size == 3:
            constants.append((node, position, value))
        name = node.output[0]
    if node is None or node.op_type != "Conv" or node.input[0] != name or attribute(node, "group", 1) != 1:
        return False
    weight = index.constant(node.input[1])
    if weight is None or weight.shape[1] != 3 or node.input[1] not in index.initializers:
        return False
    for user, position, value in constants:
        axis = value.shape.index(3)
        user.input[position] = index.add_constant(f"{user.input[position]}_bgr", np.flip(value, axis))
    node.input[1] = index.add_constant(f"{node.input[1]}_bgr", weight[:, ::-1])
    return True


def _free_names(graph: onnx.GraphProto) -> None:
    """Rename source tensors whose names the serving model needs."""
    index = GraphIndex(graph)
    ours = {FACE_INPUT, *OUTPUTS, "face_float", "face_nchw", "face_rgb", "face_centred", "face_scaled"}
    ours |= {
        "embedding_raw",
        "embedding_length",
        "contract_table",
        "contract_choice",
        "contract_number",
        "contract_row",
    }
    renamed = {}
    for name in ours & ({*index.maker, *index.initializers} | {value.name for value in graph.input}):
        renamed[name] = f"source_{name}"
    if not renamed:
        return
    for node in graph.node:
        for position, name in enumerate(node.output):
            node.output[position] = renamed.get(name, name)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = renamed.get(value.name, value.name)
    reconnect(graph, renamed)
