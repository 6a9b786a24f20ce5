"""Tiny serving ONNX files of each precision: the tensor contract, three layers, milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from arcface_build.variants.typed import to_float16

DIM = 8
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.FLOAT}


def tiny_onnx(precision: str = "fp32", first_op: str = "Cast", opset: int = 17) -> onnx.ModelProto:
    """face → Cast → Transpose → Conv → Relu → mean → Gemm → L2 norm; int8 quantises the Conv, fp16 both layers."""
    rng = np.random.default_rng(0)
    kind, dtype = FLOATS[precision], np.float16 if precision == "fp16" else np.float32
    weights = {
        "conv_w": rng.normal(0, 0.2, (16, 3, 7, 7)).astype(dtype),
        "conv_b": rng.normal(0, 0.1, 16).astype(dtype),
        "fc_w": rng.normal(0, 1, (DIM, 16)).astype(dtype),
        "scale": np.array(1 / 127.5, dtype),
        "shift": np.array(-1, dtype),
    }
    weights |= {"axes": np.array([1])} if opset >= 18 else {}
    node, nodes = helper.make_node, []
    if first_op == "Cast":
        nodes += [
            node("Cast", ["face"], ["f"], "cast", to=kind),
            node("Transpose", ["f"], ["t"], "nchw", perm=[0, 3, 1, 2]),
        ]
    else:
        nodes += [
            node("Transpose", ["face"], ["f"], "nchw", perm=[0, 3, 1, 2]),
            node("Cast", ["f"], ["t"], "cast", to=kind),
        ]
    nodes += [node("Mul", ["t", "scale"], ["m"], "mul"), node("Add", ["m", "shift"], ["x"], "add")]
    conv_inputs = ["x", "conv_w"]
    if precision == "int8":
        scale = (np.abs(weights["conv_w"]).max(axis=(1, 2, 3)) / 127).astype(np.float32)
        weights["conv_w"] = np.clip(np.round(weights["conv_w"] / scale[:, None, None, None]), -127, 127).astype(np.int8)
        weights |= {"w_s": scale, "w_z": np.zeros(16, np.int8), "x_s": np.array(1 / 127, np.float32)}
        weights["x_z"] = np.array(0, np.int8)
        nodes += [
            node("QuantizeLinear", ["x", "x_s", "x_z"], ["xq"], "q"),
            node("DequantizeLinear", ["xq", "x_s", "x_z"], ["xd"], "dq"),
            node("DequantizeLinear", ["conv_w", "w_s", "w_z"], ["wd"], "dqw", axis=0),
        ]
        conv_inputs = ["xd", "wd"]
    nodes += [
        node("Conv", [*conv_inputs, "conv_b"], ["c"], "conv", strides=[8, 8]),
        node("Relu", ["c"], ["r"], "relu"),
        node("GlobalAveragePool", ["r"], ["g"], "pool"),
        node("Flatten", ["g"], ["h"], "flatten"),
        node("Gemm", ["h", "fc_w"], ["e"], "fc", transB=1),
        node("Cast", ["e"], ["e32"], "to_float", to=TensorProto.FLOAT),
        node("ReduceL2", ["e32"], ["n"], "norm", axes=[1], keepdims=1)
        if opset < 18
        else node("ReduceL2", ["e32", "axes"], ["n"], "norm", keepdims=1),
        node("Div", ["e32", "n"], ["embedding"], "unit"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("face", TensorProto.UINT8, ["N", 112, 112, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", DIM])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def tiny_int8_and_fp16() -> onnx.ModelProto:
    """The int8 one with float16 scales, as the project makes it for TensorRT: opset 19."""
    return to_float16(tiny_onnx("int8", opset=19))


def write_tiny(path: Path, precision: str = "fp32") -> Path:
    """precision: as for `tiny_onnx`, or "int8+fp16"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(tiny_int8_and_fp16() if precision == "int8+fp16" else tiny_onnx(precision), path)
    return path
