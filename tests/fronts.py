"""Forms in which exports write preprocessing into a graph, each with what its author meant the network to see.

A form is a list of nodes in front of one and the same body. What was meant is said in plain numpy terms, so a test can
compute the intended embedding without the graph's front and without any code of the import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from arcface_clients.contract import Preprocessing
from tiny_nets import tiny_net

USUAL = Preprocessing()
BY_128 = Preprocessing("rgb", (127.5,) * 3, (128.0,) * 3)
IMAGENET = Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
IMAGENET_BGR = Preprocessing("bgr", IMAGENET.mean[::-1], IMAGENET.std[::-1])
RAW_NET = Preprocessing("rgb", (0, 0, 0), (1, 1, 1))  # a body that was trained on 0..255
UNIT_NET = Preprocessing("rgb", (0, 0, 0), (255, 255, 255))  # a body that was trained on 0..1
MAX64 = np.iinfo(np.int64).max


class Front:
    """Writes nodes in front of a body; `name` is the tensor that the next node reads."""

    def __init__(self, *, nhwc: bool = False, kind: int = TensorProto.FLOAT) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.name, self.nhwc, self.kind = "pixels", nhwc, kind

    def weight(self, value: object, dtype: type = np.float32) -> str:
        name = f"front_w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.weight(values, np.int64)

    def per_channel(self, values: object) -> str:
        return self.weight(np.reshape(values, (-1, 1, 1) if np.size(values) > 1 else ()))

    def node(self, op: str, *inputs: str, outputs: int = 1, first: bool = True, **attributes: object) -> list[str]:
        outs = [f"front{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, [*([self.name] if first else []), *inputs], outs, **attributes))
        self.name = outs[0]
        return outs

    def sub(self, values: object) -> Front:
        self.node("Sub", self.per_channel(values))
        return self

    def div(self, values: object) -> Front:
        self.node("Div", self.per_channel(values))
        return self

    def mul(self, values: object) -> Front:
        self.node("Mul", self.per_channel(values))
        return self

    def add(self, values: object) -> Front:
        self.node("Add", self.per_channel(values))
        return self

    def batch_norm(self, mean: object, std: object, scale: float = 1, bias: float = 0) -> Front:
        spread = [np.broadcast_to(np.float64(v), 3) for v in (scale, bias, mean, np.square(np.float64(std)) - 1e-5)]
        self.node("BatchNormalization", *(self.weight(v) for v in spread), epsilon=1e-5)
        return self

    def conv(self, weight: object, bias: object, group: int = 1) -> Front:
        weight = np.asarray(weight, np.float32)
        pad = weight.shape[2] // 2
        self.node("Conv", self.weight(weight), self.weight(bias), group=group, pads=[pad] * 4)
        return self

    def gather(self, axis: int = 1, order: tuple[int, ...] = (2, 1, 0)) -> Front:
        self.node("Gather", self.ints(*order), axis=axis)
        return self

    def slice_backwards(self, axis: int = 1) -> Front:
        self.node("Slice", self.ints(-1), self.ints(-MAX64), self.ints(axis), self.ints(-1))
        return self

    def split_swap(self) -> Front:
        parts = self.node("Split", self.ints(1, 1, 1), outputs=3, axis=1)
        self.node("Concat", *parts[::-1], first=False, axis=1)
        return self

    def clip(self, low: float, high: float) -> Front:
        self.node("Clip", self.weight(low), self.weight(high))
        return self

    def cast(self, kind: int) -> Front:
        self.node("Cast", to=kind)
        return self

    def reshape(self, *shape: int) -> Front:
        self.node("Reshape", self.ints(*shape))
        return self

    def transpose(self, *perm: int) -> Front:
        self.node("Transpose", perm=list(perm))
        return self

    def one(self, op: str, *inputs: str, **attributes: object) -> Front:
        self.node(op, *inputs, **attributes)
        return self

    def model(self) -> onnx.ModelProto:
        """The front before the body."""
        net = tiny_net()
        body = list(net.graph.node)
        for node in body:
            node.input[:] = [self.name if name == "input.1" else name for name in node.input]
        del net.graph.node[:], net.graph.input[:]
        net.graph.node.extend([*self.nodes, *body])
        net.graph.initializer.extend(self.weights)
        shape = ["N", 112, 112, 3] if self.nhwc else ["N", 3, 112, 112]
        net.graph.input.append(helper.make_tensor_value_info("pixels", self.kind, shape))
        return net


@dataclass(frozen=True)
class Form:
    """`meant`: what the body was trained on. `asked`: the import has to ask, and this part of its question."""

    what: str
    front: Callable[[], Front]
    meant: Preprocessing
    asked: str = ""


def diagonal(scale: float) -> np.ndarray:
    return (np.eye(3) * scale).reshape(3, 3, 1, 1)


def centre_tap(scale: float) -> np.ndarray:
    weight = np.zeros((3, 1, 3, 3))
    weight[:, :, 1, 1] = scale
    return weight


def constant_node() -> Front:
    front = Front()
    for op, value in (("Sub", 127.5), ("Div", 127.5)):
        name = f"constant_{op}"
        tensor = numpy_helper.from_array(np.float32(value))
        front.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        front.node(op, name)
    return front


def folded_arithmetic() -> Front:
    front = Front()
    front.nodes.append(helper.make_node("Mul", [front.weight(255), front.weight(0.5)], ["half_of_255"]))
    front.nodes.append(helper.make_node("Identity", ["half_of_255"], ["half_again"]))
    front.node("Sub", "half_again")
    front.node("Div", "half_again")
    return front


def minus_pixels() -> Front:
    front = Front()
    front.node("Sub", front.name, first=False)
    front.nodes[-1].input[:] = [front.weight(127.5), "pixels"]
    return front.one("Neg").div(127.5)


def by_the_picture() -> Front:
    front = Front()
    front.nodes.append(helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2, 3], keepdims=1))
    return front.one("Sub", "mean").div(127.5)


def grey_three_times() -> Front:
    front = Front()
    front.conv(np.reshape([0.299, 0.587, 0.114], (1, 3, 1, 1)) / 127.5, [-1])
    return front.one("Concat", front.name, front.name, axis=1)


def grey_matmul() -> Front:
    front = Front(nhwc=True)
    front.node("MatMul", front.weight(np.reshape([0.299, 0.587, 0.114], (3, 1)) / 127.5))
    return front.one("Concat", front.name, front.name, axis=3).transpose(0, 3, 1, 2).sub(1)


def mirror_beside() -> Front:
    front = usual()
    normalised = front.name
    front.slice_backwards(axis=3)
    front.node("Concat", normalised, front.name, first=False, axis=0)
    return front


def raw_beside_normalised() -> Front:
    front = usual()
    front.node("Concat", "pixels", front.name, first=False, axis=0)
    return front


def dynamic_reshape() -> Front:
    front = Front().sub(127.5).div(127.5)
    front.nodes.append(helper.make_node("Shape", ["pixels"], ["shape"]))
    return front.one("Reshape", "shape")


def in_a_branch() -> Front:
    front = Front()
    made = [
        helper.make_graph(
            [helper.make_node("Div", ["pixels", f"by_{which}"], [f"out_{which}"])],
            which,
            [],
            [helper.make_tensor_value_info(f"out_{which}", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.float32(by), f"by_{which}")],
        )
        for which, by in (("then", 127.5), ("else", 128.0))
    ]
    front.node("If", front.weight(True, np.bool_), first=False, then_branch=made[0], else_branch=made[1])
    return front.sub(1)


def usual() -> Front:
    return Front().sub(127.5).div(127.5)


FORMS = [
    # No front, or one that changes nothing: InsightFace's rule.
    Form("no normalisation", Front, USUAL),
    Form("Identity", lambda: Front().one("Identity"), USUAL),
    Form("Cast to float32", lambda: Front().cast(TensorProto.FLOAT), USUAL),
    Form("Cast to float16 and back", lambda: Front().cast(10).cast(1), USUAL),
    Form("NHWC, Transpose", lambda: Front(nhwc=True).transpose(0, 3, 1, 2), USUAL),
    Form("Pad by nothing", lambda: Front().one("Pad", "pads8"), USUAL),
    Form("Reshape to itself", lambda: Front().reshape(-1, 3, 112, 112), USUAL),
    # Normalisation inside, in each way it is written.
    Form("Sub, Div", usual, USUAL),
    Form("Sub, Mul", lambda: Front().sub(127.5).mul(1 / 128), BY_128),
    Form("Mul, Add", lambda: Front().mul(1 / 127.5).add(-1), USUAL),
    Form("Mul, Sub, one number each channel", lambda: Front().mul([1 / 127.5] * 3).sub([1.0] * 3), USUAL),
    Form(
        "Div by 255, then ImageNet",
        lambda: Front().div(255).sub([0.485, 0.456, 0.406]).div([0.229, 0.224, 0.225]),
        IMAGENET,
    ),
    Form("ImageNet, blue first", lambda: Front().sub(IMAGENET_BGR.mean).div(IMAGENET_BGR.std), IMAGENET_BGR),
    Form("Constant nodes", constant_node, USUAL),
    Form("constants computed from constants", folded_arithmetic, USUAL),
    Form("127.5 − x, Neg, Div", minus_pixels, USUAL),
    Form("Neg, Add, Div by a negative", lambda: Front().one("Neg").add(127.5).div(-127.5), USUAL),
    Form("Clip to 0..255, Sub, Div", lambda: Front().clip(0, 255).sub(127.5).div(127.5), USUAL),
    Form("Sub, Div, Clip to −1..1", lambda: usual().clip(-1, 1), USUAL),
    Form("Cast to uint8 and back, Sub, Div", lambda: Front().cast(2).cast(1).sub(127.5).div(127.5), USUAL),
    Form(
        "Cast to float64, Sub, Div, Cast",
        lambda: Front().cast(11).one("Sub", "half64").one("Div", "half64").cast(1),
        USUAL,
    ),
    Form(
        "Cast to float16, Sub, Div, Cast",
        lambda: Front().cast(10).one("Sub", "half16").one("Div", "half16").cast(1),
        USUAL,
    ),
    Form("Reshape, Sub, Div", lambda: Front().reshape(-1, 3, 112, 112).sub(127.5).div(127.5), USUAL),
    Form(
        "Reshape to rows, Sub, Div, Reshape back",
        lambda: Front().reshape(-1, 37632).sub(127.5).div(127.5).reshape(-1, 3, 112, 112),
        USUAL,
    ),
    Form("Sub, Div, Reshape by Shape", dynamic_reshape, USUAL),
    Form(
        "Unsqueeze, Sub, Div, Squeeze",
        lambda: Front().one("Unsqueeze", "axis0").sub(127.5).div(127.5).one("Squeeze", "axis0"),
        USUAL,
    ),
    Form("NHWC, Sub, Div, Transpose", lambda: Front(nhwc=True).sub(127.5).div(127.5).transpose(0, 3, 1, 2), USUAL),
    Form("NHWC, Transpose, Sub, Mul", lambda: Front(nhwc=True).transpose(0, 3, 1, 2).sub(127.5).mul(1 / 128), BY_128),
    Form(
        "Transpose there and back, Sub, Div",
        lambda: Front().transpose(0, 2, 3, 1).transpose(0, 3, 1, 2).sub(127.5).div(127.5),
        USUAL,
    ),
    Form("Sub, Div, Pad by nothing", lambda: usual().one("Pad", "pads8"), USUAL),
    Form("a BatchNormalization that normalises pixels", lambda: Front().batch_norm(127.5, 127.5), USUAL),
    Form("BatchNormalization with scale and bias", lambda: Front().batch_norm(0, 255, scale=2, bias=-1), USUAL),
    Form("ImageNet as a BatchNormalization", lambda: Front().batch_norm(IMAGENET.mean, IMAGENET.std), IMAGENET),
    Form("depthwise Conv 1×1", lambda: Front().conv(np.full((3, 1, 1, 1), 1 / 127.5), [-1] * 3, group=3), USUAL),
    Form("depthwise Conv 3×3, centre only", lambda: Front().conv(centre_tap(1 / 127.5), [-1] * 3, group=3), USUAL),
    Form("Conv 1×1, diagonal", lambda: Front().conv(diagonal(1 / 127.5), [-1] * 3), USUAL),
    Form("Split, three Sub and Div, Concat", lambda: split_by_channel(), IMAGENET),
    Form("Gather, Sub, Div", lambda: Front().gather().sub(127.5).div(127.5), USUAL),
    Form("Sub, Div, Gather", lambda: usual().gather(), USUAL),
    Form("Slice backwards, Sub, Div", lambda: Front().slice_backwards().sub(127.5).div(127.5), USUAL),
    Form("Split, Concat swapped, Sub, Div", lambda: Front().split_swap().sub(127.5).div(127.5), USUAL),
    Form(
        "NHWC, Gather, Sub, Div",
        lambda: Front(nhwc=True).gather(axis=3).transpose(0, 3, 1, 2).sub(127.5).div(127.5),
        USUAL,
    ),
    Form("NHWC, MatMul that swaps, Sub, Div", lambda: nhwc_matmul(), USUAL),
    Form("Conv 1×1 that swaps and normalises", lambda: Front().conv(diagonal(1 / 127.5)[::-1], [-1] * 3), USUAL),
    Form("Gather, ImageNet", lambda: Front().gather().sub(IMAGENET.mean).div(IMAGENET.std), IMAGENET),
    Form("If with a constant condition, Sub", in_a_branch, USUAL),
    # Two readings, or none: the import asks.
    Form("Div by 255 only", lambda: Front().div(255), UNIT_NET, "maps pixels 0..255 to 0..1"),
    Form("Div by 127.5 only", lambda: Front().div(127.5), USUAL, "maps pixels 0..255 to 0..2"),
    Form("Sub 127.5 only", lambda: Front().sub(127.5), USUAL, "maps pixels 0..255 to -127.5..127.5"),
    Form("x·2 − 1, for an input of 0..1", lambda: Front().mul(2).sub(1), USUAL, "it fits an input of 0..1"),
    Form("Clip to 0..255 only", lambda: Front().clip(0, 255), RAW_NET, "lets pixels 0..255 pass but not"),
    Form("Cast to uint8 only", lambda: Front().cast(2).cast(1), RAW_NET, "lets pixels 0..255 pass but not"),
    Form("Clip to 0..1", lambda: Front().clip(0, 1), UNIT_NET, "Clip before the network does not map each channel"),
    Form("a BatchNormalization of normalised pixels", lambda: Front().batch_norm(0.1, 0.6), USUAL, "maps pixels"),
    Form("a mirrored map", lambda: Front().sub(127.5).div(-127.5), USUAL, "maps pixels 0..255 to -1..1"),
    Form("Gather only", lambda: Front().gather(), USUAL, "swaps red and blue but does not normalise"),
    Form(
        "channels turned round by one",
        lambda: usual().gather(order=(1, 2, 0)),
        USUAL,
        "reorders its channels to [1, 2, 0]",
    ),
    Form("one channel three times", lambda: usual().gather(order=(1, 1, 1)), USUAL, "sees the input's channels"),
    Form(
        "means that rise",
        lambda: Front().sub([100, 120, 140]).div(64),
        Preprocessing("bgr", (100, 120, 140), (64,) * 3),
        "suggest blue first",
    ),
    Form(
        "a Conv 1×1 that mixes colours",
        lambda: Front().conv(np.full((3, 3, 1, 1), 1 / 300), [-1] * 3),
        USUAL,
        "does not map each channel",
    ),
    Form("grey, three times", grey_three_times, USUAL, "does not map each channel"),
    Form("grey by a MatMul, three times", grey_matmul, USUAL, "does not map each channel"),
    Form("each face and its mirror image as two rows", mirror_beside, USUAL, "does not map each channel"),
    Form("each face raw and normalised as two rows", raw_beside_normalised, USUAL, "does not map each channel"),
    Form(
        "a depthwise blur",
        lambda: Front().conv(np.full((3, 1, 3, 3), 1 / 1000), [-1] * 3, group=3),
        USUAL,
        "does not map each channel",
    ),
    Form("by the picture's own mean", by_the_picture, USUAL, "does not map each channel"),
    Form("a mean picture", lambda: Front().one("Sub", "mean_picture").div(127.5), USUAL, "does not map each channel"),
    Form("Sqrt", lambda: Front().one("Sqrt").sub(8).div(8), USUAL, "does not map each channel"),
    Form("a mirror image", lambda: usual().slice_backwards(axis=3), USUAL, "does not map each channel"),
]


def split_by_channel() -> Front:
    front = Front()
    parts = front.node("Split", front.ints(1, 1, 1), outputs=3, axis=1)
    done = []
    for part, mean, std in zip(parts, IMAGENET.mean, IMAGENET.std, strict=True):
        front.name = part
        done.append(front.sub(mean).div(std).name)
    front.node("Concat", *done, first=False, axis=1)
    return front


def nhwc_matmul() -> Front:
    front = Front(nhwc=True)
    front.node("MatMul", front.weight(np.eye(3)[::-1]))
    return front.transpose(0, 3, 1, 2).sub(127.5).div(127.5)


SHARED = {
    "pads8": np.array([0, 0, 0, 0, 0, 0, 0, 0], np.int64),
    "axis0": np.array([0], np.int64),
    "half64": np.array(127.5, np.float64),
    "half16": np.array(127.5, np.float16),
    "mean_picture": np.random.default_rng(3).uniform(90, 140, (1, 3, 112, 112)).astype(np.float32),
}


def model_of(form: Form) -> onnx.ModelProto:
    """The form's file."""
    front = form.front()
    read = {name for node in front.nodes for name in node.input}
    front.weights += [numpy_helper.from_array(value, name) for name, value in SHARED.items() if name in read]
    return front.model()
