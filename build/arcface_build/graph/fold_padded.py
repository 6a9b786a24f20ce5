"""Folds BatchNormalization into the padded convolution after it, exactly: scaled weights and a constant map.

    conv(W, pad(s·x + t)) = conv(W·s, pad(x)) + M,   M = conv(W, pad(t)), t constant in each channel

M has one value for each output channel and place, [1,C,H,W]; it differs from its middle only at the borders, where
part of the kernel reads padding. The convolution's own bias moves into M. It is for TensorRT, where it should save
one elementwise pass a block; ONNX Runtime and OpenVINO were measured to gain nothing (1.00–1.05).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.graph import Step
from arcface_build.graph.fold_batchnorm import affine_of, bias_of, is_exact_before, own_weight, per_weight
from arcface_build.graph.index import GraphIndex, attribute, drop_unused, reconnect, replace_nodes, shapes

if TYPE_CHECKING:
    import onnx


def fold_padded(model: onnx.ModelProto, spare: Collection[str] = ()) -> Step:
    """Fold each BatchNormalization that only a padded Conv reads; the model is changed in place.

    A Conv keeps its name and its result's name; the addition is called like it, with ".map" added.

    Args:
        model: sizes of its feature maps must be known. Weights may be float32 or float16; sums are in float64.
        spare: names of convolutions to leave as they are, such as those with quantised inputs.
    """
    graph = model.graph
    known, index = shapes(model), GraphIndex(graph)
    instead: dict[str, list[onnx.NodeProto]] = {}
    gone: dict[str, str] = {}
    kept = 0
    for node in graph.node:
        if node.op_type != "BatchNormalization":
            continue
        conv = index.only_user(node.output[0])
        nodes = [] if conv is None or conv.name in spare else _folded(index, known, node, conv)
        if conv is None or not nodes:
            kept += 1
            continue
        instead |= {node.output[0]: [], conv.output[0]: nodes}
        gone[node.output[0]] = node.input[0]
    rest = f"{kept} stay" if kept else "none stays"
    if not gone:
        return Step("fold_padded", model, False, f"no BatchNormalization before a padded Conv; {rest}")
    replace_nodes(graph, instead)
    reconnect(graph, gone)
    drop_unused(graph)
    return Step("fold_padded", model, True, f"{len(gone)} folded into a padded Conv and a constant map; {rest}")


def _folded(
    index: GraphIndex, known: Mapping[str, Sequence[object]], norm: onnx.NodeProto, conv: onnx.NodeProto
) -> list[onnx.NodeProto]:
    """The Conv with scaled weights and the Add of its map; [] if that would not be exact, or is not needed."""
    from onnx.helper import make_node

    affine, weight = affine_of(index, norm), own_weight(index, conv)
    size = list(known.get(norm.input[0], []))[2:]
    if conv.op_type != "Conv" or affine is None or weight is None or weight.ndim != 4 or len(size) != 2:
        return []
    slopes, shifts = (per_weight(conv, weight, values) for values in affine)
    bias = bias_of(index, conv, weight.shape[0])
    if slopes is None or shifts is None or bias is None or is_exact_before(conv, weight, affine[1]):
        return []
    height, width = (_reached(conv, axis, length, weight.shape[2 + axis]) for axis, length in enumerate(size))
    if height is None or width is None:
        return []
    # What the shift adds through one element of the kernel, and at which places that element reads the image.
    through = (weight * shifts).sum(axis=1)
    added = np.einsum("yk,okl,xl->oyx", height, through, width) + bias[:, None, None]
    name, out = conv.name or conv.output[0], conv.output[0]
    dtype = index.constant(conv.input[1]).dtype  # type: ignore[union-attr]  # own_weight has read it
    scaled = index.add_constant(f"{conv.input[1]}_scaled", (weight * slopes).astype(dtype))
    constant = index.add_constant(f"{out}_map", added[None].astype(dtype))
    plain = type(conv)()
    plain.CopyFrom(conv)
    plain.name = name
    plain.input[:] = [conv.input[0], scaled]
    plain.output[:] = [f"{out}_unshifted"]
    return [plain, make_node("Add", [plain.output[0], constant], [out], name=f"{name}.map")]


def _reached(conv: onnx.NodeProto, axis: int, length: object, kernel: int) -> np.ndarray | None:
    """float64 (out, kernel): 1 where a kernel element at an output place reads the image, 0 where it reads padding."""
    if not isinstance(length, int):
        return None
    stride, dilation = (int((attribute(conv, name) or [1, 1])[axis]) for name in ("strides", "dilations"))
    extent = (kernel - 1) * dilation + 1
    auto = attribute(conv, "auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        out = -(-length // stride)
        total = max((out - 1) * stride + extent - length, 0)
        before = total // 2 if auto == b"SAME_UPPER" else total - total // 2
    else:
        pads = list(attribute(conv, "pads") or [0] * 4) if auto == b"NOTSET" else [0] * 4
        before = int(pads[axis])
        out = (length + before + int(pads[axis + 2]) - extent) // stride + 1
    read = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - before
    return ((read >= 0) & (read < length)).astype(np.float64)
