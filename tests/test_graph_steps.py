"""Graph steps: each one changes what it says, says why where it does not, and keeps what the network computes."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_build.errors import SourceRefused
from arcface_build.graph import Step
from arcface_build.graph.blocked_layout import blocked_layout
from arcface_build.graph.dynamic_batch import dynamic_batch
from arcface_build.graph.fold_batchnorm import fold_batchnorm
from arcface_build.graph.fold_constants import fold_constants
from arcface_build.graph.repair_source import repair_source
from arcface_build.graph.serving import serving_form
from arcface_build.graph.upgrade_opset import upgrade_opset
from arcface_build.graph.winograd import winograd
from arcface_build.imports.forms import CONVERSION, to_serving
from arcface_clients.contract import Preprocessing, contract_words
from test_winograd import blocks
from tiny_nets import tiny_net

RNG = np.random.default_rng(7)
CONTRACT = "0123456789abcdef" * 4
IMAGE = RNG.normal(0, 1, (3, 3, 112, 112)).astype(np.float32)


def run(model: onnx.ModelProto, x: np.ndarray = IMAGE) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def ops(model: onnx.ModelProto, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)


def chain(*nodes: tuple, x: list, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """A graph of nodes in a row: (op, weight names, attributes)."""
    made, name = [], "x"
    for i, (op, inputs, attributes) in enumerate(nodes):
        made.append(helper.make_node(op, [name, *inputs], [f"t{i}"], **attributes))
        name = f"t{i}"
    graph = helper.make_graph(
        made,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def norm(size: int, prefix: str = "") -> dict[str, np.ndarray]:
    values = (RNG.uniform(0.5, 2, size), RNG.normal(0, 1, size), RNG.normal(0, 1, size), RNG.uniform(0.2, 3, size))
    return {f"{prefix}{k}": v.astype(np.float32) for k, v in zip("sbmv", values, strict=True)}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(0, 1, shape).astype(np.float32)


BN = ("BatchNormalization", list("sbmv"), {"epsilon": 1e-3})
CONV = {"kernel_shape": [3, 3]}
IMAGES = ["N", 3, 6, 6]
FOLDS = {  # name -> (graph, BatchNormalization nodes that stay)
    "Conv BN": (chain(("Conv", ["w"], CONV), BN, x=IMAGES, w=normal(4, 3, 3, 3), **norm(4)), 0),
    "Conv with bias BN": (
        chain(("Conv", ["w", "c"], CONV), BN, x=IMAGES, w=normal(4, 3, 3, 3), c=normal(4), **norm(4)),
        0,
    ),
    "depthwise Conv BN": (
        chain(("Conv", ["w"], {**CONV, "group": 3}), BN, x=IMAGES, w=normal(6, 1, 3, 3), **norm(6)),
        0,
    ),
    "BN Conv": (chain(BN, ("Conv", ["w"], CONV), x=IMAGES, w=normal(4, 3, 3, 3), **norm(3)), 0),
    "BN depthwise Conv": (
        chain(BN, ("Conv", ["w"], {**CONV, "group": 3}), x=IMAGES, w=normal(6, 1, 3, 3), **norm(3)),
        0,
    ),
    "BN padded Conv": (
        chain(BN, ("Conv", ["w"], {**CONV, "pads": [1] * 4}), x=IMAGES, w=normal(4, 3, 3, 3), **norm(3)),
        1,
    ),
    "BN Conv padded by itself": (
        chain(BN, ("Conv", ["w"], {**CONV, "auto_pad": "SAME_UPPER"}), x=IMAGES, w=normal(4, 3, 3, 3), **norm(3)),
        1,
    ),
    "BN without shift, padded Conv": (
        chain(
            BN,
            ("Conv", ["w"], {**CONV, "pads": [1] * 4}),
            x=IMAGES,
            w=normal(4, 3, 3, 3),
            **{**norm(3), "b": np.zeros(3, np.float32), "m": np.zeros(3, np.float32)},
        ),
        0,
    ),
    "Conv Flatten BN": (
        chain(
            ("Conv", ["w"], {"kernel_shape": [6, 6]}),
            ("Flatten", [], {}),
            BN,
            x=IMAGES,
            w=normal(4, 3, 6, 6),
            **norm(4),
        ),
        0,
    ),
    "Conv Flatten of a map BN": (
        chain(
            ("Conv", ["w"], {"kernel_shape": [5, 5]}),
            ("Flatten", [], {}),
            BN,
            x=IMAGES,
            w=normal(4, 3, 5, 5),
            **norm(16),
        ),
        1,
    ),
    "BN Flatten Gemm": (
        chain(
            BN,
            ("Flatten", [], {}),
            ("Gemm", ["w", "c"], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
            x=IMAGES,
            w=normal(5, 108),
            c=normal(5),
            **norm(3),
        ),
        0,
    ),
    "Gemm BN": (
        chain(
            ("Flatten", [], {}),
            ("Gemm", ["w", "c"], {"alpha": 0.5, "beta": 2.0}),
            BN,
            x=IMAGES,
            w=normal(108, 5),
            c=normal(5),
            **norm(5),
        ),
        0,
    ),
    "BN Gemm BN": (
        chain(
            ("Flatten", [], {}),
            ("BatchNormalization", ["ps", "pb", "pm", "pv"], {}),
            ("Gemm", ["w"], {"transB": 1}),
            BN,
            x=IMAGES,
            w=normal(5, 108),
            **norm(108, "p"),
            **norm(5),
        ),
        0,
    ),
    "Relu BN Relu": (chain(("Relu", [], {}), BN, ("Relu", [], {}), x=IMAGES, **norm(3)), 1),
}


@pytest.mark.parametrize("name", FOLDS)
def test_batchnorm_is_folded_where_that_is_exact(name: str) -> None:
    model, stay = FOLDS[name]
    x = RNG.normal(0, 1, (4, 3, 6, 6)).astype(np.float32)
    before = run(model, x)
    step = fold_batchnorm(model)
    assert ops(model, "BatchNormalization") == stay, step.why
    assert step.changed == (stay == 0)
    np.testing.assert_allclose(run(model, x), before, atol=2e-4 * np.abs(before).max() / 10)


def test_a_convolution_that_is_read_twice_keeps_its_batchnorm() -> None:
    model = chain(("Conv", ["w"], CONV), BN, x=IMAGES, w=normal(4, 3, 3, 3), **norm(4))
    model.graph.node.append(helper.make_node("Add", ["t0", "t1"], ["sum"]))
    model.graph.output[0].name = "sum"
    x = RNG.normal(0, 1, (2, 3, 6, 6)).astype(np.float32)
    before = run(model, x)
    assert not fold_batchnorm(model).changed
    np.testing.assert_array_equal(run(model, x), before)


def test_a_weight_that_two_convolutions_share_is_not_touched() -> None:
    model = chain(
        ("Conv", ["w"], {"kernel_shape": [1, 1]}),
        BN,
        ("Conv", ["w"], {"kernel_shape": [1, 1]}),
        x=IMAGES,
        w=normal(3, 3, 1, 1),
        **norm(3),
    )
    assert not fold_batchnorm(model).changed


@pytest.mark.parametrize(
    ("flavour", "why"),
    [
        ({"batch": 1}, "batch was fixed to 1"),
        ({"batch": 1, "baked_reshape": 1}, "batch was fixed to 1, also in 1 Reshape"),
        ({"batch": 4, "baked_reshape": 4}, "batch was fixed to 4, also in 1 Reshape"),
        ({"batch": "None", "baked_reshape": 1}, "batch was 'None', also in 1 Reshape"),
        ({"batch": None}, "batch was 'unnamed'"),
        ({"batch": "N"}, "the batch is already dynamic"),
        ({"batch": "N", "baked_reshape": -1}, "the batch is already dynamic"),
    ],
)
def test_dynamic_batch_says_what_it_was(flavour: dict, why: str) -> None:
    model = tiny_net(**flavour)
    step = dynamic_batch(model)
    assert (step.why, step.changed) == (why, "already" not in why)
    assert run(model, np.repeat(IMAGE, 3, axis=0)).shape == (9, 512)


def test_a_reshape_of_weights_is_not_mistaken_for_one_of_faces() -> None:
    model = chain(
        ("Flatten", [], {}), ("Mul", ["scale"], {}), x=[1, 3, 2, 2], r=np.array([1, 12], np.int64), v=normal(12, 1)
    )
    model.graph.node.insert(0, helper.make_node("Reshape", ["v", "r"], ["scale"]))
    assert dynamic_batch(model).why == "batch was fixed to 1"


def test_upgrade_opset_brings_mxnet_exports_to_17_with_the_same_result() -> None:
    model = tiny_net(opset=8, mxnet=True, batch=1, slope_shape="[C]", inside="mxnet")
    repair_source(model)
    before = run(model, IMAGE[:1])
    step = upgrade_opset(model)
    assert step.changed and step.model.opset_import[0].version == 17 and step.model.ir_version == 8
    assert [value.name for value in step.model.graph.input] == ["input.1"]
    np.testing.assert_allclose(run(step.model, IMAGE[:1]), before, atol=1e-5)


def test_an_operator_that_cannot_be_converted_is_named() -> None:
    per_pixel = {key: np.ones((3, 6, 6), np.float32) for key in "sbmv"}
    model = chain(
        ("BatchNormalization", list("sbmv"), {"spatial": 0}), ("Flatten", [], {}), x=IMAGES, opset=8, **per_pixel
    )
    assert not repair_source(model).changed  # this spatial=0 means what it says
    with pytest.raises(
        SourceRefused, match=r"^cannot convert opset 8 to 17: .*Export the model again with opset 17\.$"
    ):
        upgrade_opset(model)


def test_constants_become_weights_and_no_ops_go() -> None:
    model = chain(
        ("Identity", [], {}), ("Mul", ["k2"], {}), ("Dropout", [], {}), ("Relu", [], {}), x=IMAGES, k=normal(1)
    )
    constant = helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32([2])))
    model.graph.node.insert(0, helper.make_node("Mul", ["k", "two"], ["k2"]))
    model.graph.node.insert(0, constant)
    before = run(model, IMAGE[:, :, :6, :6])
    step = fold_constants(model)
    assert step.why == "2 constant nodes turned into weights, 2 Identity or Dropout nodes dropped"
    assert [node.op_type for node in model.graph.node] == ["Mul", "Relu"]
    np.testing.assert_array_equal(run(model, IMAGE[:, :, :6, :6]), before)


@pytest.mark.parametrize(
    ("flavour", "color", "order"),
    [
        ({}, "rgb", "first Conv's weights"),
        ({}, "bgr", "none needed"),
        ({"inside": "pytorch"}, "rgb", "first Conv's weights"),
        ({"bn_before_conv": True}, "rgb", "Gather"),
    ],
)
def test_the_channel_order_costs_a_node_only_where_no_convolution_can_take_it(
    flavour: dict, color: str, order: str
) -> None:
    model = tiny_net(**flavour)
    faces = RNG.integers(0, 256, (2, 112, 112, 3)).astype(np.uint8)
    preprocessing = Preprocessing(color, (10, 20, 30), (4, 5, 6))
    raw = run(model, preprocessing.apply(faces))
    step = serving_form(model, preprocessing, 512, CONTRACT)
    assert step.why.endswith(f"channel order: {order}")
    assert ops(model, "Gather") == 1 + (order == "Gather")  # one gives the rows of the contract
    np.testing.assert_allclose(run(model, faces), raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)


def test_the_cpu_form_computes_the_same_without_leaving_the_blocked_layout() -> None:
    model = tiny_net(bn_before_conv=True)
    before = run(model)
    step = blocked_layout(model)
    assert step.why == "2 PRelu and 4 BatchNormalization as depthwise 1×1 Conv"
    assert (ops(model, "PRelu"), ops(model, "BatchNormalization")) == (1, 4)  # 3 and 12 channels are not blocked
    np.testing.assert_allclose(run(model), before, atol=1e-5)


@pytest.mark.parametrize("slope", [0.25, 0.0, 1.0, 1.7, -0.4])
def test_prelu_as_convolutions_is_exact_for_any_slope(slope: float) -> None:
    slopes = np.full((8, 1, 1), slope, np.float32)
    model = chain(("PRelu", ["a"], {}), x=["N", 8, 5, 5], a=slopes)
    x = RNG.normal(0, 3, (2, 8, 5, 5)).astype(np.float32)
    expected = run(model, x)
    assert blocked_layout(model).changed
    np.testing.assert_allclose(run(model, x), expected, atol=1e-6)


@pytest.mark.parametrize(
    "slopes", [np.float32([[[0.25]]]), np.full((6, 1, 1), 0.25, np.float32), np.full((8, 5, 5), 0.25, np.float32)]
)
def test_prelu_without_one_slope_a_blocked_channel_stays(slopes: np.ndarray) -> None:
    model = chain(("PRelu", ["a"], {}), x=["N", max(len(slopes), 2), 5, 5], a=slopes)
    step = blocked_layout(model)
    assert (step.changed, step.why) == (False, "nothing to rewrite")


def test_a_zero_embedding_stays_zero_instead_of_nan() -> None:
    model = chain(("Mul", ["zero"], {}), ("Flatten", [], {}), x=["N", 3, 112, 112], zero=np.float32([0]))
    serving_form(model, Preprocessing(), 3 * 112 * 112, CONTRACT)
    assert not run(model, np.full((1, 112, 112, 3), 9, np.uint8)).any()


@pytest.mark.parametrize("value", [1.0, 0.0, np.nan, np.inf])
def test_an_answer_names_its_contract_whatever_the_network_computed(value: float) -> None:
    """Nothing of `face` is asked for it: OpenVINO would compute the pixels or the first convolution another way."""
    model = chain(("Mul", ["times"], {}), ("Flatten", [], {}), x=["N", 3, 112, 112], times=np.float32([value]))
    serving_form(model, Preprocessing(), 3 * 112 * 112, CONTRACT)
    readers = [node.op_type for node in model.graph.node if {"face", "face_float"} & set(node.input)]
    assert readers == ["Cast", "Transpose"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    faces = RNG.integers(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    norms, rows = session.run(["norm", "contract"], {"face": faces})
    assert norms.shape == (3, 1) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows, np.tile(contract_words(CONTRACT), (3, 1)))


def test_a_step_says_what_it_did_in_a_manifest() -> None:
    assert Step("name", tiny_net(), True, "because").to_json() == {"step": "name", "changed": True, "why": "because"}


def test_a_graph_that_is_made_another_way_is_of_another_conversion() -> None:
    """Or a second import of the same source would be `unchanged`, and keep the former graph."""
    made, _ = to_serving(tiny_net(), Preprocessing(), 512, CONTRACT)
    forms = [made, onnx.ModelProto.FromString(made.SerializeToString()), blocks(14)]
    assert blocked_layout(forms[1]).changed and winograd(forms[2], fewest_channels=8).changed
    nodes = [(node.op_type, len(node.input)) for form in forms for node in form.graph.node]
    digest = hashlib.sha256(repr(nodes).encode()).hexdigest()[:16]
    assert (CONVERSION, digest) == (6, "0e382e22cfbf86aa")
