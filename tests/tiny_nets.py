"""Tiny ArcFace-like networks in every flavour: three strided convolutions with BatchNorm and PReLU, FC, BatchNorm."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = (8, 8, 12)


class TinyNet:
    """Writes nodes and weights; `name` is the tensor that the next node reads."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.name = "input.1"

    def weight(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *inputs: str, name: str | None = None, **attributes: object) -> None:
        label = name or f"{op}_{len(self.nodes)}"
        out = f"{label}_out"
        self.nodes.append(helper.make_node(op, [self.name, *inputs], [out], name=label, **attributes))
        self.name = out

    def conv(self, into: int, out: int, pad: int = 1) -> None:
        scale = 1 / np.sqrt(into * 9)
        w = self.weight(f"conv{len(self.nodes)}_w", self.rng.normal(0, scale, (out, into, 3, 3)).astype(np.float32))
        self.node("Conv", w, kernel_shape=[3, 3], strides=[2, 2], pads=[pad] * 4)

    def batch_norm(self, size: int, **attributes: object) -> None:
        n = len(self.nodes)
        values = (
            self.rng.uniform(0.5, 1.5, size),
            self.rng.normal(0, 0.3, size),
            self.rng.normal(0, 0.2, size),
            self.rng.uniform(0.5, 2, size),
        )
        names = [self.weight(f"bn{n}_{i}", v.astype(np.float32)) for i, v in enumerate(values)]
        self.node("BatchNormalization", *names, epsilon=2e-5, **attributes)


def tiny_net(
    *,
    batch: int | str | None = "N",
    dim: int = 512,
    opset: int = 17,
    baked_reshape: int | None = None,
    inside: str | None = None,
    slope_shape: str = "[C,1,1]",
    mxnet: bool = False,
    nhwc: bool = False,
    sides: tuple[int | str, int | str] = (112, 112),
    across_batch: bool = False,
    bn_before_conv: bool = False,
    map_output: bool = False,
    input_name: str = "input.1",
    seed: int = 0,
) -> onnx.ModelProto:
    """One flavour of it.

    `inside`: None, "mxnet" (names _minusscalar0, _mulscalar0), "pytorch", "computed" or "half" (x·2 − 1)."""
    net = TinyNet(seed)
    net.name = input_name
    if nhwc:
        net.node("Transpose", perm=[0, 3, 1, 2])
    if inside == "mxnet":
        net.node("Sub", net.weight("mean", np.float32([127.5])), name="_minusscalar0")
        net.node("Mul", net.weight("scale", np.float32([1 / 128])), name="_mulscalar0")
    elif inside == "pytorch":
        net.node("Div", net.weight("d", np.float32(255)), name="/Div")
        net.node("Sub", net.weight("m", np.float32([[[0.485]], [[0.456]], [[0.406]]])), name="/Sub")
        net.node("Div", net.weight("s", np.float32([[[0.229]], [[0.224]], [[0.225]]])), name="/Div_1")
    elif inside == "computed":  # constants that other constants are made into, as exporters without folding write
        net.weight("m", np.float32([127.5]))
        net.weight("axes", np.array([1, 2, 3], np.int64))
        net.nodes.append(helper.make_node("Unsqueeze", ["m", "axes"], ["m4"]))
        net.node("Sub", "m4", name="/Sub")
        net.node("Div", "m4", name="/Div")
    elif inside == "half":
        net.node("Mul", net.weight("two", np.float32(2)), name="/Mul")
        net.node("Sub", net.weight("one", np.float32(1)), name="/Sub")
    spatial = {"spatial": 0} if mxnet else {}
    before = 3
    for channels in CHANNELS:
        if bn_before_conv:
            net.batch_norm(before)
        net.conv(before, channels, pad=1)
        net.batch_norm(channels, **spatial)
        slope = net.rng.uniform(0.1, 0.4, channels).astype(np.float32)
        if slope_shape == "[C,1,1]":
            slope = slope.reshape(-1, 1, 1)
        net.node("PRelu", net.weight(f"slope{len(net.nodes)}", slope))
        before = channels
    if across_batch:
        net.nodes.append(helper.make_node("ReduceMean", [net.name], ["over_faces"], axes=[0], keepdims=1))
        net.node("Add", "over_faces")
    net.batch_norm(before, **spatial)
    width = before * 14 * 14
    if mxnet:
        net.node("Dropout", ratio=0.4) if opset < 12 else net.node("Dropout")
    if baked_reshape is not None:
        net.node("Reshape", net.weight("flat_shape", np.array([baked_reshape, width], np.int64)))
    elif not mxnet:
        net.node("Flatten", axis=1)
    weight = net.rng.normal(0, 1 / np.sqrt(width), (dim, width)).astype(np.float32)
    bias = net.rng.normal(0, 0.1, dim).astype(np.float32)
    net.node("Gemm", net.weight("fc_w", weight), net.weight("fc_b", bias), transB=1)
    net.batch_norm(dim, **spatial)
    if map_output:
        net.node("Reshape", net.weight("map_shape", np.array([0, dim, 1, 1], np.int64)))
    net.nodes[-1].output[0] = "output"
    out_shape = [batch, dim, 1, 1] if map_output else [batch, dim]
    shape = [batch, *sides, 3] if nhwc else [batch, 3, *sides]
    inputs = [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, shape)]
    if mxnet:  # IR version 3: weights are listed among the inputs
        inputs += [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in net.weights]
    graph = helper.make_graph(
        net.nodes,
        "tiny",
        inputs,
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, out_shape)],
        net.weights,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if mxnet else 8, producer_name="tiny"
    )
