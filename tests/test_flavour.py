"""Flavours and refusals: what a file is, and for each file that is no ArcFace model the whole message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_build.errors import SourceRefused
from arcface_build.imports.flavour import flavour_of
from arcface_build.imports.importing import import_model
from arcface_build.imports.onnx_file import read_source
from arcface_build.imports.proof_faces import ProofFaces
from arcface_build.imports.source import known_models, resolve
from arcface_clients.errors import ArcFaceError, Missing
from arcface_clients.faces.synthetic import synthetic_faces
from tiny_nets import tiny_net

ITSELF = "Import the recognition ONNX itself."


def one_node(op: str, shape: list, out: list, *, kind: int = TensorProto.FLOAT, outputs: int = 1) -> onnx.ModelProto:
    """A graph of one node: enough for everything that is refused by its inputs and outputs."""
    nodes = [helper.make_node(op, ["x", "w"] if op in ("Mul",) else ["x"], [f"y{i}"]) for i in range(outputs)]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(f"y{i}", kind, out) for i in range(outputs)],
        [numpy_helper.from_array(np.ones(1, helper.tensor_dtype_to_np_dtype(kind)), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def changed(change: Callable[[onnx.ModelProto], None], **flavour: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        model = tiny_net(**flavour)
        change(model)
        path = folder / "net.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def written(data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "net.onnx"
        path.write_bytes(data)
        return path

    return write


def saved(model: onnx.ModelProto) -> Callable[[Path], Path]:
    return written(model.SerializeToString())


def truncated(folder: Path) -> Path:
    return written(tiny_net().SerializeToString()[:100_000])(folder)


def without_weights_beside_it(folder: Path) -> Path:
    path = folder / "net.onnx"
    onnx.save(tiny_net(), str(path), save_as_external_data=True, location="net.bin", size_threshold=1024)
    (folder / "net.bin").unlink()
    return path


def with_truncated_weights_beside_it(folder: Path) -> Path:
    path = folder / "net.onnx"
    onnx.save(tiny_net(), str(path), save_as_external_data=True, location="net.bin", size_threshold=1024)
    (folder / "net.bin").write_bytes((folder / "net.bin").read_bytes()[:5000])
    return path


def weights_outside_its_folder(folder: Path) -> Path:
    path = folder / "net.onnx"
    onnx.save(tiny_net(), str(path), save_as_external_data=True, location="net.bin", size_threshold=1024)
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../etc/passwd"
    path.write_bytes(model.SerializeToString())
    return path


def set_weight(name: str, value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[3] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]))


def softmax_at_the_end(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["output"], axis=1))


def softmax_behind_others(model: onnx.ModelProto) -> None:
    softmax_at_the_end(model)
    model.graph.node[-1].output[0] = "shares"
    model.graph.node.append(helper.make_node("Identity", ["shares"], ["same"]))
    model.graph.node.append(helper.make_node("Flatten", ["same"], ["output"], axis=1))


def margin_head(model: onnx.ModelProto, *, normalised: bool = True, axis: int = 0) -> None:
    """Cosines to 1024 people × 64, as ArcFace trains: unit embedding × unit centres."""
    centres = np.random.default_rng(1).normal(0, 1, (512, 1024) if axis == 0 else (1024, 512))
    if normalised:
        centres /= np.linalg.norm(centres, axis=axis, keepdims=True)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(centres.astype(np.float32), "centres"))
    graph.initializer.append(numpy_helper.from_array(np.float32(64), "sixty_four"))
    graph.node[-1].output[0] = "features"
    graph.node.append(helper.make_node("LpNormalization", ["features"], ["unit"], axis=1))
    if axis == 0:
        graph.node.append(helper.make_node("MatMul", ["unit", "centres"], ["cosines"]))
    else:
        graph.node.append(helper.make_node("Gemm", ["unit", "centres"], ["cosines"], transB=1))
    graph.node.append(helper.make_node("Mul", ["cosines", "sixty_four"], ["output"]))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 1024]))


def margin_head_of_rows(model: onnx.ModelProto) -> None:
    margin_head(model, axis=1)


def margin_head_normalised_inside(model: onnx.ModelProto) -> None:
    """The centres' length is divided out by the graph, as F.linear(x, F.normalize(w)) is exported."""
    margin_head(model, normalised=False)
    graph = model.graph
    product = next(node for node in graph.node if node.op_type == "MatMul")
    product.input[1] = "unit_centres"
    position = list(graph.node).index(product)
    graph.node.insert(position, helper.make_node("Div", ["centres", "lengths"], ["unit_centres"]))
    graph.node.insert(position, helper.make_node("ReduceL2", ["centres"], ["lengths"], axes=[0], keepdims=1))


def training_mode(model: onnx.ModelProto) -> None:
    bn = next(n for n in model.graph.node if n.op_type == "BatchNormalization")
    bn.attribute.append(helper.make_attribute("training_mode", 1))


def all_weights_zero(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "fc_w")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), "fc_w"))


def name_for_insightface(model: onnx.ModelProto) -> None:
    model.graph.node[0].name, model.graph.node[1].name = "Sub_0", "Mul_1"


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type = "Frobnicate"


FACE = ["N", 3, 112, 112]
HEAD = (
    "net.onnx ends in products with 1024 vectors of length 1, like the cosines of a training head: expected an "
    "embedding. Export the backbone; if the output is the embedding, name it: --output output."
)
REFUSED = {
    "an empty file": (written(b""), "net.onnx is empty: expected an ONNX file. Copy or download it again."),
    "noise": (
        written(bytes(range(200, 256)) * 50),
        f"net.onnx is not an ONNX file (it starts with c8 c9 ca cb). {ITSELF}",
    ),
    "a Git LFS pointer": (
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3998070\n"),
        "net.onnx is a Git LFS pointer, not the weights: expected an ONNX file. Fetch them: git lfs pull.",
    ),
    "a PyTorch checkpoint": (
        written(b"PK\x03\x04" + bytes(100)),
        "net.onnx is a zip (a PyTorch checkpoint or a model pack): expected an ONNX file. "
        "Export or unpack the recognition ONNX.",
    ),
    "a web page": (
        written(b"<!DOCTYPE html><title>404</title>"),
        "net.onnx is a web page or XML: expected an ONNX file. Download the file itself.",
    ),
    "a TensorRT plan": (
        written(b"ftrt" + bytes(100)),
        "net.onnx is a TensorRT plan: expected an ONNX file. Import the ONNX that it was built from.",
    ),
    "a truncated file": (
        truncated,
        "net.onnx is damaged or truncated (100,000 bytes): expected a complete ONNX file. Download it again.",
    ),
    "weights not beside it": (
        without_weights_beside_it,
        "net.onnx keeps its weights in another file: expected net.bin beside it. Copy it into the same folder.",
    ),
    "weights beside it truncated": (
        with_truncated_weights_beside_it,
        "net.onnx keeps its weights in another file: expected net.bin beside it. Copy it into the same folder.",
    ),
    "weights outside its folder": (
        weights_outside_its_folder,
        "net.onnx keeps its weights in another file: expected ../../etc/passwd beside it. "
        "Copy it into the same folder.",
    ),
    "another size": (
        saved(tiny_net(sides=(160, 160))),
        f"net.onnx takes images of ?×3×160×160: expected 112×112. {ITSELF}",
    ),
    "a landmark model": (
        saved(one_node("Relu", ["None", 3, 192, 192], ["N", 212])),
        f"net.onnx takes images of ?×3×192×192, which looks like a landmark model: expected 112×112. {ITSELF}",
    ),
    "a gender and age model": (
        saved(one_node("Relu", ["None", 3, 96, 96], ["N", 3])),
        f"net.onnx takes images of ?×3×96×96, which looks like a gender and age model: expected 112×112. {ITSELF}",
    ),
    "a landmark model for 112×112": (
        saved(tiny_net(dim=212)),
        f"net.onnx gives 212 numbers per face: expected an embedding of 128, 256 or 512. {ITSELF}",
    ),
    "an emotion model for 112×112": (
        saved(tiny_net(dim=7)),
        f"net.onnx gives 7 numbers per face: expected an embedding of 128, 256 or 512. {ITSELF}",
    ),
    "a detector": (
        saved(one_node("Relu", FACE, FACE, outputs=9)),
        f"net.onnx has 9 outputs, none of them an embedding, so it is a face detector: expected one of N×D. {ITSELF}",
    ),
    "a picture as output": (
        saved(one_node("Relu", FACE, FACE)),
        f"net.onnx gives N×3×112×112: expected an embedding, N×D. {ITSELF}",
    ),
    "a classifier": (
        changed(softmax_at_the_end),
        f"net.onnx ends in Softmax, so it is a classifier: expected an embedding. {ITSELF}",
    ),
    "a classifier whose Softmax is not last": (
        changed(softmax_behind_others),
        f"net.onnx ends in Softmax, so it is a classifier: expected an embedding. {ITSELF}",
    ),
    "a training head": (changed(margin_head), HEAD),
    "a training head by a Gemm": (changed(margin_head_of_rows), HEAD),
    "a training head that normalises its centres": (changed(margin_head_normalised_inside), HEAD),
    "two inputs": (
        changed(second_input),
        f"net.onnx has 2 inputs (input.1, label): expected only the face. {ITSELF}",
    ),
    "a vector as input": (
        saved(one_node("Relu", ["N", 512], ["N", 512])),
        f"net.onnx takes ?×512: expected one RGB image, N×3×112×112. {ITSELF}",
    ),
    "grey images": (
        saved(one_node("Relu", ["N", 1, 112, 112], ["N", 512])),
        f"net.onnx takes ?×1×112×112: expected one RGB image, N×3×112×112. {ITSELF}",
    ),
    "whole numbers": (
        saved(one_node("Relu", FACE, ["N", 512], kind=TensorProto.INT32)),
        "net.onnx takes int32: expected float32, float16, float64 or uint8. Export it in float32.",
    ),
    "NaN weights": (
        changed(set_weight("fc_w", np.nan)),
        "net.onnx: weight fc_w contains 1 NaN or infinite numbers of 1,204,224: expected finite ones. "
        "Export it from an intact checkpoint.",
    ),
    "infinite weights": (
        changed(set_weight("fc_b", np.inf)),
        "net.onnx: weight fc_b contains 1 NaN or infinite numbers of 512: expected finite ones. "
        "Export it from an intact checkpoint.",
    ),
    "training mode": (
        changed(training_mode),
        "net.onnx was exported in training mode, so the faces of a batch affect each other: expected inference mode. "
        "Export it after model.eval().",
    ),
    "the same answer for every face": (
        changed(all_weights_zero),
        "net.onnx gives every face the same embedding: expected a trained recognition model. Check the export.",
    ),
    "names that contradict the graph": (
        changed(name_for_insightface),
        "net.onnx: cannot tell the preprocessing: InsightFace reads 'inside the graph' from node names, but no "
        "constant is subtracted from the input or multiplied with it. "
        "State what it expects: --color rgb --mean 127.5 --std 127.5 (in 0..255 units).",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_each_file_that_is_no_arcface_model_is_refused_in_one_sentence(what: str, tmp_path: Path) -> None:
    make, message = REFUSED[what]
    given, models = tmp_path / "given", tmp_path / "models"
    given.mkdir()
    path = make(given)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SourceRefused) as caught:
        source = resolve(str(path), given, known=known_models())
        import_model(source, models / "net", ProofFaces(synthetic_faces(2), "synthetic"))
    assert str(caught.value) == message
    assert sorted(p for p in tmp_path.rglob("*") if p != models) == before


def test_a_graph_that_onnx_runtime_cannot_load_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = changed(unknown_operator)(tmp_path)
    with pytest.raises(SourceRefused, match=r"^net\.onnx: ONNX Runtime cannot load the graph: .*Frobnicate.*"):
        import_model(
            resolve(str(path), tmp_path, known=known_models()),
            tmp_path / "m",
            ProofFaces(synthetic_faces(2), "synthetic"),
        )
    assert not (tmp_path / "m").exists()


def test_a_file_that_is_not_there_is_missing_not_refused(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"does not exist: expected an ONNX file\. See what can be imported"):
        read_source(tmp_path / "net.onnx")


def test_the_real_detector_is_refused(assets: Path, tmp_path: Path) -> None:
    path = assets / "detectors" / "face_detection_yunet_2023mar.onnx"
    with pytest.raises(ArcFaceError, match="takes images of 1×3×640×640, which looks like a face detector"):
        flavour_of(read_source(path), path.name)


@pytest.mark.parametrize(
    ("flavour", "expected"),
    [
        ({}, ("NCHW", "N", 17, False, "[C,1,1]")),
        ({"batch": 1, "opset": 13}, ("NCHW", 1, 13, False, "[C,1,1]")),
        ({"batch": "None", "nhwc": True}, ("NHWC", "None", 17, False, "[C,1,1]")),
        (
            {"batch": None, "mxnet": True, "opset": 8, "inside": "mxnet", "slope_shape": "[C]"},
            ("NCHW", "unnamed", 8, True, "[C]"),
        ),
        ({"inside": "pytorch"}, ("NCHW", "N", 17, False, "[C,1,1]")),
    ],
)
def test_what_the_file_is(flavour: dict, expected: tuple) -> None:
    found = flavour_of(tiny_net(**flavour), "net.onnx")
    assert (found.layout, found.batch, found.opset, found.insightface_says_inside, found.prelu_slopes) == expected
    assert found.dim == 512
