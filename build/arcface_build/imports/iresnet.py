"""Builds InsightFace's IResNet (recognition/arcface_torch/backbones/iresnet.py) as ONNX from a checkpoint's tensors.

Names and shapes of the tensors give the architecture: the number of blocks in each of four stages, and the embedding
width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.errors import SourceRefused
from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_SIZE

if TYPE_CHECKING:
    import onnx

DEPTHS: dict[tuple[int, ...], str] = {
    (2, 2, 2, 2): "r18",
    (3, 4, 6, 3): "r34",
    (3, 4, 14, 3): "r50",
    (3, 13, 30, 3): "r100",
    (6, 26, 60, 6): "r200",
}
OPSET = 17
EPSILON = 1e-5
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def iresnet(tensors: dict[str, Array], file: str) -> tuple[onnx.ModelProto, str]:
    """Returns (ONNX: `input.1` float32 [N,3,112,112] → `output` [N,D], a description in words).

    Raises:
        SourceRefused: these are not exactly the tensors of an IResNet; `file` names the checkpoint.
    """
    left = {name for name in tensors if not name.endswith("num_batches_tracked")}
    numbers = [{name.split(".")[1] for name in left if name.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    stages = tuple(len(found) for found in numbers)
    head = [name for name in left if name.startswith(("weight", "kernel", "head.", "loss.", "softmax"))]
    if not all(stages):
        what = f"the classification head ({', '.join(sorted(head)[:3])})" if head else "another network"
        some = ", ".join(sorted(left)[:4]) or "no tensors"
        raise SourceRefused(
            f"{file} contains {what}, not an IResNet of arcface_torch: expected conv1, layer1.0.bn1 … features; "
            f"got {some}. Import its backbone, or export it to ONNX: torch.onnx.export"
        )
    net = _Writer(tensors, file)
    net.conv("conv1", padding=1)
    net.batch_norm("bn1")
    net.prelu("prelu")
    for stage, blocks in enumerate(stages, start=1):
        for block in range(blocks):
            _block(net, f"layer{stage}.{block}", stride=1 if block else 2)
    net.batch_norm("bn2")
    net.add("Flatten", axis=1)
    net.dense("fc")
    net.batch_norm("features")
    unknown = sorted(left - net.read)
    if unknown:
        raise SourceRefused(
            f"{file} is an IResNet with extra tensors ({', '.join(unknown[:3])}): expected arcface_torch's own. "
            "Export it to ONNX: torch.onnx.export"
        )
    name = DEPTHS.get(stages, f"{stages} blocks")
    return net.model(), f"IResNet {name}, built from the tensors of {file}"


def _block(net: _Writer, name: str, stride: int) -> None:
    """BN, conv, BN, PReLU, conv, BN; added to its input, or to that input through a strided 1×1 convolution."""
    start = net.name
    net.batch_norm(f"{name}.bn1")
    net.conv(f"{name}.conv1", padding=1)
    net.batch_norm(f"{name}.bn2")
    net.prelu(f"{name}.prelu")
    net.conv(f"{name}.conv2", padding=1, stride=stride)
    net.batch_norm(f"{name}.bn3")
    residual, net.name = net.name, start
    if stride != 1:
        net.conv(f"{name}.downsample.0", stride=stride)
        net.batch_norm(f"{name}.downsample.1")
    net.add("Add", residual)


class _Writer:
    """Appends nodes; `name` is the tensor that the next one reads, `read` the checkpoint's tensors used so far."""

    def __init__(self, tensors: dict[str, Array], file: str) -> None:
        self.name, self.read = "input.1", set[str]()
        self._tensors, self._file = tensors, file
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._dim = 0

    def add(self, op: str, *inputs: str, **attributes: Any) -> None:
        from onnx import helper

        out = f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, [self.name, *inputs], [out], name=out, **attributes))
        self.name = out

    def conv(self, name: str, padding: int = 0, stride: int = 1) -> None:
        self.add("Conv", self._weight(f"{name}.weight", rank=4), pads=[padding] * 4, strides=[stride] * 2)

    def batch_norm(self, name: str) -> None:
        self.add(
            "BatchNormalization", *(self._weight(f"{name}.{part}", rank=1) for part in STATISTICS), epsilon=EPSILON
        )

    def prelu(self, name: str) -> None:
        self.add("PRelu", self._weight(f"{name}.weight", rank=1, shape=(-1, 1, 1)))

    def dense(self, name: str) -> None:
        weight, bias = self._weight(f"{name}.weight", rank=2), self._weight(f"{name}.bias", rank=1)
        self._dim = len(self._tensors[f"{name}.bias"])
        self.add("Gemm", weight, bias, transB=1)

    def model(self) -> onnx.ModelProto:
        import onnx
        from onnx import TensorProto, helper

        self._nodes[-1].output[0] = "output"
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self._nodes,
            "iresnet",
            [value("input.1", TensorProto.FLOAT, ["N", 3, FACE_SIZE, FACE_SIZE])],
            [value("output", TensorProto.FLOAT, ["N", self._dim])],
            self._weights,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        try:
            onnx.checker.check_model(made, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
            reason = str(exc).strip().splitlines()[0]
            raise SourceRefused(
                f"{self._file}: its tensors do not fit together as an IResNet: {reason}. Export it to ONNX."
            ) from exc
        return made

    def _weight(self, name: str, rank: int, shape: tuple[int, ...] | None = None) -> str:
        from onnx import numpy_helper

        value = self._tensors.get(name)
        if value is None or value.ndim != rank:
            got = "nothing" if value is None else "×".join(map(str, value.shape))
            raise SourceRefused(
                f"{self._file} is not a complete IResNet: expected {name} of rank {rank}, got {got}. Save the whole "
                "state_dict, or export it to ONNX: torch.onnx.export"
            )
        self.read.add(name)
        value = np.ascontiguousarray(value if shape is None else value.reshape(shape), np.float32)
        self._weights.append(numpy_helper.from_array(value, name))
        return name
