"""Folds each BatchNormalization into a neighbouring Conv or Gemm, where that is exact.

A BN is y = s·x + t with s = scale / sqrt(var + epsilon) and t = bias − s·mean (ONNX operator specification). After a
Conv or Gemm it is folded into weight and bias; before one too, unless a padded Conv would see 0 where t belongs (there
`fold_padded` does it for TensorRT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.index import GraphIndex, attribute, reconnect, replace_nodes, shapes

if TYPE_CHECKING:
    import onnx


def fold_batchnorm(model: onnx.ModelProto) -> Step:
    """Fold what can be folded exactly; arithmetic in float64, weights back to float32."""
    graph = model.graph
    known = shapes(model)
    index = GraphIndex(graph)
    folded, kept = [], 0
    for node in [n for n in graph.node if n.op_type == "BatchNormalization"]:
        affine = affine_of(index, node)
        if affine is not None and (_into_maker(index, known, node, *affine) or _into_user(index, known, node, *affine)):
            folded.append(node)
        else:
            kept += 1
    instead = {node.output[0]: node.input[0] for node in folded}
    last = [node for node in folded if node.output[0] in index.outputs]
    replace_nodes(graph, {name: [] for name in instead})
    for node in last:  # the graph's output keeps its name
        next(n for n in graph.node if n.output[0] == node.input[0]).output[0] = node.output[0]
        del instead[node.output[0]]
    reconnect(graph, instead)
    if not folded:
        why = f"{kept} BatchNormalization cannot be folded exactly" if kept else "no BatchNormalization"
        return Step("fold_batchnorm", model, False, why)
    rest = f"; {kept} stay (before a padded Conv, or their input is used twice)" if kept else ""
    return Step("fold_batchnorm", model, True, f"{len(folded)} folded into their neighbour{rest}")


def affine_of(index: GraphIndex, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
    """(s, t) of y = s·x + t per channel, float64; None if a parameter is computed at run time."""
    values = [value for name in node.input[1:5] if (value := index.constant(name)) is not None]
    if len(values) != 4:
        return None
    scale, bias, mean, variance = (value.astype(np.float64) for value in values)
    slope = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return slope, bias - slope * mean


def _into_maker(
    index: GraphIndex, known: dict[str, list], node: onnx.NodeProto, slope: np.ndarray, shift: np.ndarray
) -> bool:
    """Conv → BN, Gemm → BN and Conv → Flatten of (N,C,1,1) → BN, if nothing else reads the Conv."""
    maker = index.maker.get(node.input[0])
    if maker is None or index.only_user(node.input[0]) is not node:
        return False
    if maker.op_type in ("Flatten", "Reshape") and _flattens(index, known, maker):
        flat = maker.input[0]
        if known.get(flat, [])[2:] != [1, 1] or index.only_user(flat) is not maker or flat not in index.maker:
            return False
        maker = index.maker[flat]
    weight = own_weight(index, maker)
    if weight is None:
        return False
    rows_last = maker.op_type == "Gemm" and not attribute(maker, "transB", 0)
    per_row = (-1,) if rows_last else (-1, *[1] * (weight.ndim - 1))
    bias = bias_of(index, maker, slope.size)
    if bias is None:
        return False
    # Gemm computes alpha·x·W + beta·b; beta stays in the node, so the shift in b is divided by beta.
    beta = attribute(maker, "beta", 1.0) if maker.op_type == "Gemm" else 1.0
    _set(index, maker, weight * slope.reshape(per_row), (bias * beta * slope + shift) / beta)
    return True


def _into_user(
    index: GraphIndex, known: dict[str, list], node: onnx.NodeProto, slope: np.ndarray, shift: np.ndarray
) -> bool:
    """BN → Conv without padding, BN → (Flatten →) Gemm, if nothing else reads the BN."""
    user = index.only_user(node.output[0])
    if user is None:
        return False
    spread = 1
    if user.op_type in ("Flatten", "Reshape") and _flattens(index, known, user):
        shape = known.get(node.output[0]) or known.get(node.input[0]) or []
        if len(shape) < 2 or not all(isinstance(d, int) for d in shape[1:]):
            return False
        spread = int(np.prod(shape[2:]))
        user = index.only_user(user.output[0])
        if user is None or user.op_type != "Gemm":
            return False
    weight = own_weight(index, user)
    if weight is None or (user.op_type == "Conv" and not is_exact_before(user, weight, shift)):
        return False
    slope, shift = np.repeat(slope, spread), np.repeat(shift, spread)
    if user.op_type == "Conv":
        return _fold_before_conv(index, user, weight, slope, shift)
    return _fold_before_gemm(index, user, weight, slope, shift)


def _fold_before_conv(
    index: GraphIndex, conv: onnx.NodeProto, weight: np.ndarray, slope: np.ndarray, shift: np.ndarray
) -> bool:
    slopes, shifts = per_weight(conv, weight, slope), per_weight(conv, weight, shift)
    bias = bias_of(index, conv, weight.shape[0])
    if slopes is None or shifts is None or bias is None:
        return False
    _set(index, conv, weight * slopes, bias + (weight * shifts).reshape(len(weight), -1).sum(axis=1))
    return True


def per_weight(conv: onnx.NodeProto, weight: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """One value per input channel of a Conv, in the layout of its weight (O, I/group, 1 …); None if they do not match.

    Output channel o reads only the input channels of its own group.
    """
    groups = attribute(conv, "group", 1)
    out, per_group = weight.shape[:2]
    if per_group * groups != values.size:
        return None
    channels = (np.arange(out) // (out // groups))[:, None] * per_group + np.arange(per_group)
    return np.asarray(values[channels].reshape(out, per_group, *[1] * (weight.ndim - 2)))


def _fold_before_gemm(
    index: GraphIndex, gemm: onnx.NodeProto, weight: np.ndarray, slope: np.ndarray, shift: np.ndarray
) -> bool:
    transposed = bool(attribute(gemm, "transB", 0))
    matrix = weight if transposed else weight.T  # (out, in)
    alpha, beta = attribute(gemm, "alpha", 1.0), attribute(gemm, "beta", 1.0)
    bias = bias_of(index, gemm, matrix.shape[0])
    if matrix.shape[1] != slope.size or bias is None:
        return False
    bias = bias + alpha * (matrix @ shift) / beta
    matrix = matrix * slope
    _set(index, gemm, matrix if transposed else matrix.T, bias)
    return True


def own_weight(index: GraphIndex, node: onnx.NodeProto) -> np.ndarray | None:
    """Float64 weight of a Conv or Gemm if it is constant and used only here; else None."""
    if node.op_type not in ("Conv", "Gemm") or len(index.users.get(node.input[1], [])) != 1:
        return None
    if node.op_type == "Gemm" and (attribute(node, "transA", 0) or not attribute(node, "beta", 1.0)):
        return None
    weight = index.constant(node.input[1])
    return None if weight is None else weight.astype(np.float64)


def bias_of(index: GraphIndex, node: onnx.NodeProto, size: int) -> np.ndarray | None:
    """Float64 bias (size,), zeros if the node has none; None if it is not one number per output."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(size)
    bias = index.constant(node.input[2])
    if bias is None or bias.size not in (1, size):
        return None
    return np.broadcast_to(bias.astype(np.float64).reshape(-1), (size,)).copy()


def _set(index: GraphIndex, node: onnx.NodeProto, weight: np.ndarray, bias: np.ndarray) -> None:
    """Give the node new weights; the bias becomes a new tensor, because it may be shared."""
    import onnx

    old = index.initializers[node.input[1]]
    old.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(weight, np.float32), old.name))
    name = index.add_constant(f"{node.output[0]}_bias", bias.astype(np.float32))
    if len(node.input) < 3:
        node.input.append(name)
    else:
        node.input[2] = name


def is_exact_before(conv: onnx.NodeProto, weight: np.ndarray, shift: np.ndarray) -> bool:
    """A padded Conv reads 0 outside the image, where the BN would give t: exact only without padding, or if t is 0."""
    if not shift.any():
        return True
    auto = attribute(conv, "auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        return all(size == 1 for size in weight.shape[2:])
    return not any(attribute(conv, "pads", []))


def _flattens(index: GraphIndex, known: dict[str, list], node: onnx.NodeProto) -> bool:
    """Whether the node turns (N, C, H, W) into (N, C·H·W)."""
    if node.op_type == "Flatten":
        return bool(attribute(node, "axis", 1) == 1)
    shape = index.constant(node.input[1])
    return shape is not None and shape.size == 2 and shape[0] in (0, -1)
