"""The form of the graph that TensorRT gets: exact on ONNX Runtime for every kind of padding, and undone by nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from arcface_build.graph.fold_batchnorm import fold_batchnorm
from arcface_build.graph.fold_padded import fold_padded
from arcface_build.graph.prelu_as_relu import prelu_as_relu
from arcface_build.graph.tensorrt_form import TensorRtForm, with_made
from arcface_clients.errors import WrongUse
from test_graph_steps import BN, chain, norm, normal, ops, run
from tiny_nets import tiny_net

X = normal(3, 6, 9, 8)
IMAGES = ["N", 6, 9, 8]
PADDED: dict[str, dict[str, Any]] = {
    "pads": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    "pads that differ on each side, a stride": {"kernel_shape": [3, 2], "pads": [2, 0, 1, 1], "strides": [2, 1]},
    "dilation": {"kernel_shape": [3, 3], "pads": [2, 2, 2, 2], "dilations": [2, 2]},
    "padding wider than the kernel": {"kernel_shape": [1, 1], "pads": [1, 1, 1, 1]},
    "SAME_UPPER": {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "SAME_LOWER": {"kernel_shape": [2, 3], "auto_pad": "SAME_LOWER"},
    "groups": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 2},
    "depthwise": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 6},
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", PADDED)
def test_batchnorm_before_a_padded_convolution_folds_exactly(name: str, bias: bool) -> None:
    how = PADDED[name]
    weights = {"w": normal(12, 6 // how.get("group", 1), *how["kernel_shape"]), **norm(6)}
    conv = ("Conv", ["w", "c"] if bias else ["w"], how)
    model = chain(BN, conv, x=IMAGES, **weights, **({"c": normal(12)} if bias else {}))
    before = run(model, X)
    assert not fold_batchnorm(model).changed
    step = fold_padded(model)
    assert step.changed, step.why
    assert [node.op_type for node in model.graph.node] == ["Conv", "Add"]
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    after = run(model, X)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    assert np.abs(after - before)[:, :, 0, 0].max() <= 1e-5 * np.abs(before).max()  # a corner reads most padding


def test_a_batchnorm_that_others_read_or_that_is_spared_stays() -> None:
    how = {"kernel_shape": [3, 3], "pads": [1] * 4}
    model = chain(BN, ("Conv", ["w"], how), x=IMAGES, w=normal(6, 6, 3, 3), **norm(6))
    model.graph.node[1].name = "quantised"
    assert fold_padded(model, spare={"quantised"}).why == "no BatchNormalization before a padded Conv; 1 stay"
    model.graph.node.append(onnx.helper.make_node("Add", ["t0", "t1"], ["sum"]))
    model.graph.output[0].name = "sum"
    before = run(model, X)
    assert not fold_padded(model).changed
    np.testing.assert_array_equal(run(model, X), before)


def test_weights_in_float16_stay_in_float16() -> None:
    how = {"kernel_shape": [3, 3], "pads": [1] * 4}
    model = chain(BN, ("Conv", ["w"], how), x=IMAGES, w=normal(6, 6, 3, 3).astype(np.float16), **norm(6))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert fold_padded(model).changed
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16}
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_prelu_in_pointwise_form_adds_no_rounding() -> None:
    model = chain(("PRelu", ["a"], {}), x=IMAGES, a=normal(6, 1, 1))
    before = run(model, X)
    step = prelu_as_relu(model)
    assert step.why == "1 of 1 PRelu as Relu, Min, Mul and Add"
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    np.testing.assert_array_equal(run(model, X), before)
    assert prelu_as_relu(model).why == "no PRelu"


@pytest.mark.parametrize("prelu", ["as-is", "fused"])
def test_a_whole_network_in_tensorrts_form_gives_the_same_embeddings(prelu: str) -> None:
    model = tiny_net(bn_before_conv=True)
    fold_batchnorm(model)
    names = {node.name for node in model.graph.node}
    image = normal(3, 3, 112, 112)
    before, norms = run(model, image), ops(model, "BatchNormalization")
    assert norms == 3
    steps = TensorRtForm(prelu=prelu).steps(model)
    assert [step.changed for step in steps] == [True] * (2 if prelu == "fused" else 1)
    assert ops(model, "BatchNormalization") == 0
    assert ops(model, "PRelu") == (0 if prelu == "fused" else 3)
    after = run(model, image)
    cosine = (after * before).sum(1) / np.linalg.norm(after, axis=1) / np.linalg.norm(before, axis=1)
    assert 1 - cosine.min() < 1e-6
    made = {node.name for node in model.graph.node} - names
    assert made and made <= with_made(model, names)  # what is kept in float32 takes along what became of it


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(WrongUse, match=r"prelu is 'quick': expected one of as-is, fused"):
        TensorRtForm(prelu="quick")
