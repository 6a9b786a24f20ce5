"""Recognises what kind of ArcFace export an ONNX model is, and refuses anything else in one sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.errors import SourceRefused
from arcface_build.graph.index import GraphIndex, attribute, shapes
from arcface_build.graph.serving import SERVING_NAME
from arcface_build.graph.upgrade_opset import opset_of
from arcface_build.imports.onnx_file import IMPORT_ITSELF
from arcface_build.imports.outputs import is_width, last_step
from arcface_clients.contract import FACE_SIZE

if TYPE_CHECKING:
    import onnx

OTHER_SIZES = {
    64: "an attribute model",
    80: "a liveness model",
    96: "a gender and age model",
    128: "a face swap model",
    192: "a landmark model",
    224: "an image classifier",
    320: "a face detector",
    640: "a face detector",
}


FLOAT16 = 10  # onnx.TensorProto's numbers
INPUT_TYPES = {1: "float32", FLOAT16: "float16", 11: "float64", 2: "uint8"}


@dataclass(frozen=True)
class Flavour:
    """Properties of the file.

    `insightface_says_inside` is InsightFace's own rule: a node named Sub… (or _minus…) and one named Mul… (_mul…)
    among the first eight (insightface.model_zoo.arcface_onnx).
    """

    input: str
    input_type: str
    layout: str
    output: str
    float16: bool
    batch: int | str
    opset: int
    producer: str
    nodes: int
    dim: int | None
    insightface_says_inside: bool
    prelu_slopes: str
    batchnorms: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def flavour_of(model: onnx.ModelProto, file: str) -> Flavour:
    """Inspect and check the model.

    Raises:
        SourceRefused: not a face recognition model for 112×112 crops; `file` names it in the message.
    """
    _check_trained_form(model, file)
    index = GraphIndex(model.graph)
    known = shapes(model)
    face, layout = _face_input(index, file)
    dim = _embedding(index, known, model, file)
    _check_training(model.graph, file)
    _check_weights(index, file)
    shape = face.type.tensor_type.shape.dim
    names = [node.name for node in model.graph.node[:8]]
    return Flavour(
        input=face.name,
        input_type=INPUT_TYPES[face.type.tensor_type.elem_type],
        output=model.graph.output[0].name,
        float16=any(tensor.data_type == FLOAT16 for tensor in model.graph.initializer),
        layout=layout,
        batch=shape[0].dim_value if shape[0].dim_value > 0 else shape[0].dim_param or "unnamed",
        opset=opset_of(model),
        producer=f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        nodes=len(model.graph.node),
        dim=dim,
        insightface_says_inside=any(name.startswith(("Sub", "_minus")) for name in names)
        and any(name.startswith(("Mul", "_mul")) for name in names),
        prelu_slopes=_slopes(index),
        batchnorms=sum(node.op_type == "BatchNormalization" for node in model.graph.node),
    )


def _check_trained_form(model: onnx.ModelProto, file: str) -> None:
    """Refuse files made for one runtime, or by us, from the file that should be imported."""
    ops = {node.op_type for node in model.graph.node}
    domains = {node.domain for node in model.graph.node}
    quantised = ops & {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"}
    if model.graph.name == SERVING_NAME:
        raise SourceRefused(
            f"{file} is a serving ONNX made by an import: expected its source. Import the source.onnx beside it."
        )
    if quantised:
        raise SourceRefused(
            f"{file} is already quantised ({', '.join(sorted(quantised))}): expected the original float file. Import "
            "that, then make int8 from it: arcface quantize"
        )
    if "com.microsoft.nchwc" in domains:
        raise SourceRefused(
            f"{file} was optimised by ONNX Runtime for one CPU (com.microsoft.nchwc): expected the original file. "
            "Import that."
        )


def _face_input(index: GraphIndex, file: str) -> tuple[onnx.ValueInfoProto, str]:
    """The only image input and its layout, checked."""
    import onnx

    inputs = index.inputs()
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise SourceRefused(f"{file} has {len(inputs)} inputs ({names}): expected only the face. {IMPORT_ITSELF}.")
    face = inputs[0]
    kind = face.type.tensor_type.elem_type
    shape = [dim.dim_value if dim.dim_value > 0 else None for dim in face.type.tensor_type.shape.dim]
    shown = "×".join(str(size or "?") for size in shape) or "no shape"
    if kind not in INPUT_TYPES:
        got = onnx.TensorProto.DataType.Name(kind).lower()
        raise SourceRefused(f"{file} takes {got}: expected float32, float16, float64 or uint8. Export it in float32.")
    if len(shape) != 4 or 3 not in (shape[1] or 3, shape[3] or 3):
        raise SourceRefused(f"{file} takes {shown}: expected one RGB image, N×3×112×112. {IMPORT_ITSELF}.")
    layout = "NHWC" if shape[3] == 3 and shape[1] != 3 else "NCHW"
    sides = shape[1:3] if layout == "NHWC" else shape[2:4]
    if any(side not in (None, FACE_SIZE) for side in sides):
        what = OTHER_SIZES.get(sides[0] or 0)
        looks = f", which looks like {what}" if what else ""
        raise SourceRefused(f"{file} takes images of {shown}{looks}: expected 112×112. {IMPORT_ITSELF}.")
    return face, layout


def _embedding(index: GraphIndex, known: dict[str, list], model: onnx.ModelProto, file: str) -> int | None:
    """The width of the only output, checked; None if the file does not state it."""
    outputs = model.graph.output
    shape = known.get(outputs[0].name)
    maker = last_step(index, outputs[0].name)
    if maker is not None and maker.op_type in ("Softmax", "LogSoftmax", "Sigmoid", "ArgMax"):
        raise SourceRefused(
            f"{file} ends in {maker.op_type}, so it is a classifier: expected an embedding. {IMPORT_ITSELF}."
        )
    if shape is None or not isinstance(shape[-1], int):
        return _gemm_width(index, maker)
    width = [size for size in shape[1:] if size != 1] if len(shape) > 1 else shape
    if len(shape) not in (1, 2, 4) or len(width) != 1:
        shown = "×".join(str(size or "?") for size in shape)
        raise SourceRefused(f"{file} gives {shown}: expected an embedding, N×D. {IMPORT_ITSELF}.")
    return check_width(width[0], file)


def check_width(dim: int, file: str) -> int:
    """D, refused if no recognition model has that width."""
    if not is_width(dim):
        head = " (a training head's classes?)" if dim > 4096 else ""
        raise SourceRefused(
            f"{file} gives {dim} numbers per face{head}: expected an embedding of 128, 256 or 512. {IMPORT_ITSELF}."
        )
    return dim


def _gemm_width(index: GraphIndex, maker: onnx.NodeProto | None) -> int | None:
    """D from the weights of a last Gemm, where shape inference gave up."""
    while maker is not None and maker.op_type == "BatchNormalization":
        maker = last_step(index, maker.input[0])
    if maker is None or maker.op_type != "Gemm":
        return None
    weight = index.constant(maker.input[1])
    return None if weight is None else int(weight.shape[0 if attribute(maker, "transB", 0) else 1])


def _check_training(graph: onnx.GraphProto, file: str) -> None:
    for node in graph.node:
        if node.op_type == "BatchNormalization" and attribute(node, "training_mode", 0):
            raise SourceRefused(
                f"{file} was exported in training mode, so the faces of a batch affect each other: "
                "expected inference mode. Export it after model.eval()."
            )


def _check_weights(index: GraphIndex, file: str) -> None:
    """Check that weights are present and finite."""
    import onnx

    floats = 0
    for tensor in index.graph.initializer:
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            continue
        try:
            value = onnx.numpy_helper.to_array(tensor)
        except ValueError as exc:
            shown = "×".join(map(str, tensor.dims))
            raise SourceRefused(
                f"{file}: weight {tensor.name} is damaged: expected {shown} numbers. Download it again."
            ) from exc
        floats += value.size
        if not np.isfinite(value).all():
            bad = int((~np.isfinite(value)).sum())
            raise SourceRefused(
                f"{file}: weight {tensor.name} contains {bad} NaN or infinite numbers of {value.size:,}: "
                "expected finite ones. Export it from an intact checkpoint."
            )
    if not floats and not any(node.op_type == "Constant" for node in index.graph.node):
        raise SourceRefused(f"{file} contains no weights: expected a trained network. {IMPORT_ITSELF}.")


def _slopes(index: GraphIndex) -> str:
    shapes_seen = {
        "×".join(map(str, value.shape))
        for node in index.graph.node
        if node.op_type == "PRelu" and (value := index.constant(node.input[1])) is not None
    }
    ranks = {text.count("×") + 1 for text in shapes_seen}
    names = {1: "[C]", 3: "[C,1,1]", 4: "[1,C,1,1]"}
    return ", ".join(names.get(rank, f"rank {rank}") for rank in sorted(ranks)) or "none"
