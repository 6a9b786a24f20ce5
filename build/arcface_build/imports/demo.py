"""Builds demo networks shaped like ArcFace's. NOT FOR RECOGNITION: the weights are random.

They have the layers of real networks, and BatchNorm statistics measured on synthetic faces, so that different faces get
different embeddings; with plain random weights all faces would be alike, and drift figures would mean nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_clients.contract import FACE_SIZE, Preprocessing
from arcface_clients.engines.runtimes import OnnxSession, open_session
from arcface_clients.errors import WrongUse
from arcface_clients.faces import synthetic
from arcface_clients.faces.synthetic import synthetic_faces

if TYPE_CHECKING:
    import onnx

OPSET = 17
DIM = 512
NOT_FOR_RECOGNITION = "DEMO, NOT FOR RECOGNITION: seeded random weights, never trained"
# Blocks per stage: IResNet as InsightFace trains it (recognition/arcface_torch/backbones/iresnet.py).
IRESNET_STAGES = {"r18": (2, 2, 2, 2), "r34": (3, 4, 6, 3), "r50": (3, 4, 14, 3), "r100": (3, 13, 30, 3)}
# MobileFaceNet (arXiv 1804.07573, table 1): expansion, channels, blocks, stride of the first block.
MOBILE_STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
ARCHITECTURES = ("mobile", *IRESNET_STAGES)
CALIBRATION_FACES = 64


def build_demo(
    arch: str = "mobile", seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> onnx.ModelProto:
    """Build a network with seeded weights and measured BatchNorm statistics; same arguments, same model.

    Args:
        arch: one of `ARCHITECTURES`; mobile takes seconds and 5 MB, r100 up to a minute and 250 MB.
        seed: for the weights.
        progress: called with (convolutions done, total).

    Returns:
        ONNX, opset 17: `input.1` float32 [N,3,112,112] RGB, (x − 127.5) / 127.5 → `output` float32 [N,512], not
        normalised, like InsightFace's own exports.

    Raises:
        WrongUse: no such architecture.
    """
    if arch not in ARCHITECTURES:
        raise WrongUse(
            f"no demo architecture {arch!r}: expected one of {', '.join(ARCHITECTURES)}. "
            "Try: arcface import demo --arch mobile"
        )
    faces = Preprocessing().apply(synthetic_faces(CALIBRATION_FACES, seed=1_000_003 + seed))
    net = _Net(faces, seed, 0 if progress is None else _count_convolutions(arch), progress)
    (_mobile if arch == "mobile" else _iresnet)(net, arch)
    return net.model(arch, seed)


def recipe(arch: str, seed: int = 0) -> str:
    """One line with all that `build_demo` depends on besides installed packages: arguments and a digest of the code."""
    code = hashlib.sha256()
    for module in (__file__, synthetic.__file__):
        code.update(Path(module).read_bytes())
    return f"demo {arch}, seed {seed}, code {code.hexdigest()[:16]}"


def _iresnet(net: _Net, arch: str) -> None:
    """IResNet: stem, four stages of pre-activated residual blocks, then BN, flatten, FC, BN."""
    net.conv(64, 3)
    net.batch_norm()
    net.prelu()
    for channels, blocks in zip((64, 128, 256, 512), IRESNET_STAGES[arch], strict=True):
        for block in range(blocks):
            stride = 2 if block == 0 else 1
            shortcut = net.mark()
            net.batch_norm()
            net.conv(channels, 3)
            net.batch_norm()
            net.prelu()
            net.conv(channels, 3, stride)
            net.batch_norm()
            residual = net.mark()
            if stride == 2:
                net.back_to(shortcut)
                net.conv(channels, 1, stride)
                net.batch_norm()
                shortcut = net.mark()
            net.back_to(residual)
            net.add(shortcut)
    net.batch_norm()
    net.flatten()
    net.dense(DIM)
    net.batch_norm(affine=False)


def _mobile(net: _Net, arch: str) -> None:
    """MobileFaceNet with 512 outputs: inverted residual blocks, then a depthwise 7×7 convolution instead of pooling."""
    net.conv(64, 3, 2)
    net.batch_norm()
    net.prelu()
    net.conv(64, 3, depthwise=True)
    net.batch_norm()
    net.prelu()
    for expansion, channels, blocks, first_stride in MOBILE_STAGES:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            shortcut = net.mark()
            inner = channels * expansion
            net.conv(inner, 1)
            net.batch_norm()
            net.prelu()
            net.conv(inner, 3, stride, depthwise=True)
            net.batch_norm()
            net.prelu()
            net.conv(channels, 1)
            net.batch_norm()
            if block:
                net.add(shortcut)
    net.conv(512, 1)
    net.batch_norm()
    net.prelu()
    net.conv(512, 7, depthwise=True, padded=False)
    net.batch_norm()
    net.conv(DIM, 1)
    net.flatten()
    net.batch_norm(affine=False)


def _count_convolutions(arch: str) -> int:
    if arch == "mobile":
        return 5 + 3 * sum(blocks for _, _, blocks, _ in MOBILE_STAGES)
    return 1 + 2 * sum(IRESNET_STAGES[arch]) + len(IRESNET_STAGES[arch])


class _Net:
    """Builds the graph and runs it along the way on the calibration faces, so that each BatchNorm sees its input."""

    def __init__(
        self, value: np.ndarray, seed: int, convolutions: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.name, self.value = "input.1", value
        self._rng = np.random.default_rng([seed, 112])
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._sessions: dict[tuple[int, ...], OnnxSession] = {}
        self._convolutions, self._done, self._progress = convolutions, 0, progress

    def mark(self) -> tuple[str, np.ndarray]:
        """The current position in the graph, for `back_to` and `add`."""
        return self.name, self.value

    def back_to(self, place: tuple[str, np.ndarray]) -> None:
        """Continue from an earlier position."""
        self.name, self.value = place

    def conv(
        self, channels: int, kernel: int, stride: int = 1, *, depthwise: bool = False, padded: bool = True
    ) -> None:
        """Convolution without bias, He-normal weights (gain for PReLU(0.25))."""
        group = self.value.shape[1] if depthwise else 1
        fan_in = self.value.shape[1] // group * kernel * kernel
        shape = (channels, self.value.shape[1] // group, kernel, kernel)
        weight = self._rng.normal(0, math.sqrt(2 / (1 + 0.25**2) / fan_in), shape).astype(np.float32)
        pad = kernel // 2 if padded else 0
        sizes: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        session = self._conv_session(kernel, stride, pad, group)
        self.value = session.run(None, {"x": self.value, "w": weight})[0]
        self._append("Conv", {"weight": weight}, **sizes, group=group)
        self._done += 1
        if self._progress:
            self._progress(self._done, self._convolutions)

    def batch_norm(self, *, affine: bool = True) -> None:
        """BatchNormalization with the mean and variance of its input; scale and shift random, or 1 and 0."""
        axes = (0, 2, 3) if self.value.ndim == 4 else (0,)
        channels = self.value.shape[1]
        mean = self.value.mean(axes, dtype=np.float64)
        centred = self.value - _per_channel(mean.astype(np.float32), self.value.ndim)
        var = np.square(centred).mean(axes, dtype=np.float64)
        scale = self._rng.uniform(0.8, 1.2, channels) if affine else np.ones(channels)
        shift = self._rng.normal(0, 0.1, channels) if affine else np.zeros(channels)
        epsilon = 1e-5
        centred *= _per_channel((scale / np.sqrt(var + epsilon)).astype(np.float32), centred.ndim)
        centred += _per_channel(shift.astype(np.float32), centred.ndim)
        self.value = centred
        self._append("BatchNormalization", {"scale": scale, "shift": shift, "mean": mean, "var": var}, epsilon=epsilon)

    def prelu(self) -> None:
        """PReLU with one random slope per channel."""
        slope = self._rng.uniform(0.05, 0.45, (self.value.shape[1], 1, 1)).astype(np.float32)
        self.value = np.maximum(self.value, 0) + slope * np.minimum(self.value, 0)
        self._append("PRelu", {"slope": slope})

    def add(self, place: tuple[str, np.ndarray]) -> None:
        """Add the tensor at an earlier position."""
        self.value = self.value + place[1]
        self._append("Add", {}, extra_inputs=[place[0]])

    def flatten(self) -> None:
        """(N,C,H,W) → (N,C·H·W)."""
        self.value = self.value.reshape(len(self.value), -1)
        self._append("Flatten", {}, axis=1)

    def dense(self, width: int) -> None:
        """Fully connected layer with bias."""
        fan_in = self.value.shape[1]
        weight = self._rng.normal(0, 1 / math.sqrt(fan_in), (width, fan_in)).astype(np.float32)
        bias = self._rng.normal(0, 0.1, width).astype(np.float32)
        self.value = self.value @ weight.T + bias
        self._append("Gemm", {"weight": weight, "bias": bias}, transB=1)

    def model(self, arch: str, seed: int) -> onnx.ModelProto:
        """The finished model, checked."""
        import onnx
        from onnx import TensorProto, helper

        self._nodes[-1].output[0] = "output"
        graph = helper.make_graph(
            self._nodes,
            f"demo-{arch}",
            [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["N", 3, FACE_SIZE, FACE_SIZE])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", DIM])],
            self._weights,
            doc_string=NOT_FOR_RECOGNITION,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=8,  # contemporary with opset 17: old runtimes reject newer ones
            producer_name="arcface-triton demo",
            doc_string=NOT_FOR_RECOGNITION,
        )
        helper.set_model_props(model, {"warning": NOT_FOR_RECOGNITION, "arch": arch, "seed": str(seed)})
        onnx.checker.check_model(model)
        return model

    def _append(
        self, op: str, weights: dict[str, np.ndarray], extra_inputs: list[str] | None = None, **attributes: Any
    ) -> None:
        from onnx import helper, numpy_helper

        node = f"{op}_{len(self._nodes)}"
        names = [f"{node}.{key}" for key in weights]
        for name, weight in zip(names, weights.values(), strict=True):
            self._weights.append(numpy_helper.from_array(weight.astype(np.float32), name))
        inputs = [self.name, *(extra_inputs or []), *names]
        self._nodes.append(helper.make_node(op, inputs, [f"{node}.out"], name=node, **attributes))
        self.name = f"{node}.out"

    def _conv_session(self, kernel: int, stride: int, pad: int, group: int) -> OnnxSession:
        """One convolution with its weights as an input, so that a few sessions serve a whole network."""
        from onnx import TensorProto, helper

        key = (kernel, stride, pad, group)
        if key not in self._sessions:
            node = helper.make_node(
                "Conv", ["x", "w"], ["y"], strides=[stride] * 2, pads=[pad] * 4, group=group, kernel_shape=[kernel] * 2
            )
            values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in ("x", "w", "y")]
            graph = helper.make_graph([node], "conv", values[:2], values[2:])
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
            self._sessions[key] = open_session(model, threads=0, settings={})
        return self._sessions[key]


def _per_channel(values: np.ndarray, ndim: int) -> np.ndarray:
    return values.reshape(1, -1, *[1] * (ndim - 2))
