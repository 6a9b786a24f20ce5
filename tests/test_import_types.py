"""Any means any: files in other types, of other shapes, with more outputs; and files that are something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_build.errors import ProofFailed, SourceRefused
from arcface_build.graph import Step
from arcface_build.graph.repair_source import repair_source
from arcface_build.imports import forms, importing
from arcface_build.imports.importing import import_model
from arcface_build.imports.preprocessing import Stated
from arcface_build.imports.proof_faces import ProofFaces
from arcface_build.imports.source import file_digest, known_models, resolve
from arcface_clients.contract import Preprocessing
from arcface_clients.engines.import_manifest import ImportManifest
from arcface_clients.faces.synthetic import synthetic_faces
from tiny_nets import tiny_net

FACES = synthetic_faces(6)
HALF, DOUBLE = TensorProto.FLOAT16, TensorProto.DOUBLE


def in_type(model: onnx.ModelProto, kind: int, *, keep_io: bool) -> onnx.ModelProto:
    """The model with weights and arithmetic in another float type, as converters write it."""
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    if not keep_io:
        graph.input[0].type.tensor_type.elem_type = graph.output[0].type.tensor_type.elem_type = kind
        return model
    for node in graph.node:
        node.input[:] = ["cast_in" if name == "input.1" else name for name in node.input]
    graph.node[-1].output[0] = "cast_out"
    graph.node.insert(0, helper.make_node("Cast", ["input.1"], ["cast_in"], to=kind))
    graph.node.append(helper.make_node("Cast", ["cast_out"], ["output"], to=TensorProto.FLOAT))
    return model


def takes_uint8(*, nhwc: bool = False) -> onnx.ModelProto:
    model = tiny_net(inside="pytorch", nhwc=nhwc)
    for node in model.graph.node:
        node.input[:] = ["as_float" if name == "input.1" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", ["input.1"], ["as_float"], to=TensorProto.FLOAT))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


def one_row(op: str) -> onnx.ModelProto:
    """An export for one face, whose output is [512]."""
    model = tiny_net(batch=1)
    graph = model.graph
    graph.node[-1].output[0] = "rows"
    if op == "Gather":
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "first"))
        graph.node.append(helper.make_node("Gather", ["rows", "first"], ["output"], axis=0))
    elif op == "Squeeze":
        graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axes"))
        graph.node.append(helper.make_node("Squeeze", ["rows", "axes"], ["output"]))
    else:
        graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "flat"))
        graph.node.append(helper.make_node("Reshape", ["rows", "flat"], ["output"]))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("output", TensorProto.FLOAT, [512]))
    return model


def with_output(op: str, shape: list, *, first: bool = False, **attributes: object) -> onnx.ModelProto:
    """A second output beside the embedding."""
    model = tiny_net()
    source = next(n for n in model.graph.node if n.op_type == "PRelu").output[0] if op == "Identity" else "output"
    model.graph.node.append(helper.make_node(op, [source], ["second"], **attributes))
    value = helper.make_tensor_value_info("second", TensorProto.FLOAT, shape)
    model.graph.output.insert(0 if first else 1, value)
    return model


FORMS: dict[str, tuple[Callable[[], onnx.ModelProto], dict]] = {
    "float16, float32 in and out": (lambda: in_type(tiny_net(), HALF, keep_io=True), {}),
    "float16 throughout": (lambda: in_type(tiny_net(), HALF, keep_io=False), {}),
    "float64, float32 in and out": (lambda: in_type(tiny_net(), DOUBLE, keep_io=True), {}),
    "float64 throughout": (lambda: in_type(tiny_net(), DOUBLE, keep_io=False), {}),
    "uint8 input": (takes_uint8, {"inside": "pytorch"}),
    "uint8 input, NHWC": (lambda: takes_uint8(nhwc=True), {"inside": "pytorch"}),
    "output [512] by Gather": (lambda: one_row("Gather"), {}),
    "output [512] by Squeeze": (lambda: one_row("Squeeze"), {}),
    "output [512] by Reshape": (lambda: one_row("Reshape"), {}),
    "a norm behind the embedding": (lambda: with_output("ReduceL2", ["N", 1], axes=[1]), {}),
    "a norm before the embedding": (lambda: with_output("ReduceL2", ["N", 1], axes=[1], first=True), {}),
    "a feature map beside it": (lambda: with_output("Identity", ["N", 8, 56, 56]), {}),
}


def run_import(path: Path, **arguments: object) -> ImportManifest:
    source = resolve(str(path), path.parent, known=known_models())
    return import_model(source, path.parent / "models" / path.stem, ProofFaces(FACES, "synthetic"), **arguments)


def embed(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"face": FACES})[0]


def cosine_to(network: onnx.ModelProto, fed: Preprocessing, got: np.ndarray) -> float:
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    raw = session.run(["output"], {"input.1": fed.apply(FACES)})[0]
    return float((got * raw / np.linalg.norm(raw, axis=1, keepdims=True)).sum(axis=1).min())


@pytest.mark.parametrize("what", FORMS)
def test_each_type_and_shape_gives_the_embedding_of_the_plain_network(what: str, tmp_path: Path) -> None:
    make, plain = FORMS[what]
    path = tmp_path / "net.onnx"
    onnx.save(make(), str(path))
    manifest = run_import(path)
    fed = Preprocessing("rgb", (0, 0, 0), (1, 1, 1)) if plain else Preprocessing()
    limit = 0.9999 if "float16" in what else 0.99999
    assert cosine_to(tiny_net(**plain), fed, embed(tmp_path / "models/net/serving.onnx")) >= limit
    assert manifest.source["copy"]["exact"] is False
    as_given = manifest.source["copy"]["min_cosine_to_file"]
    assert as_given is None if "float64" in what else as_given >= 0.999  # ONNX Runtime has no PRelu in float64


def test_a_repair_that_makes_another_network_fails_against_the_file_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: onnx.ModelProto) -> Step:
        step = repair_source(model)
        tensor = next(t for t in model.graph.initializer if t.name == "fc_b")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.5), "fc_b"))
        return step

    monkeypatch.setattr(importing, "repair_source", broken)
    path = tmp_path / "net.onnx"
    onnx.save(in_type(tiny_net(), HALF, keep_io=False), str(path))
    with pytest.raises(ProofFailed, match=r"differs from the original file: expected cosine ≥ 0\.999, got 0\."):
        run_import(path)


def two_embeddings() -> onnx.ModelProto:
    return with_output("Neg", ["N", 512])


def test_two_outputs_that_can_be_the_embedding_are_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(two_embeddings(), str(path))
    with pytest.raises(SourceRefused) as caught:
        run_import(path)
    assert str(caught.value) == (
        "net.onnx has 2 outputs that could be the embedding (output, second): expected one. Name it: --output NAME"
    )
    with pytest.raises(SourceRefused, match=r"has no output third: expected one of output, second"):
        run_import(path, output="third")
    first = run_import(path, output="output")
    plain = embed(tmp_path / "models/net/serving.onnx")
    second = run_import(path, output="second")
    np.testing.assert_allclose(embed(tmp_path / "models/net/serving.onnx"), -plain, atol=1e-6)
    assert first.contract_id != second.contract_id


def test_an_output_of_unknown_shape_may_be_the_embedding_and_is_asked_about(tmp_path: Path) -> None:
    model = with_output("MatMul", ["N", 64])
    model.graph.node[-1].input.append("to_64")
    weight = np.random.default_rng(0).normal(0, 1, (512, 64)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "to_64"))
    for op, before, after in (("Shape", "output", "shape"), ("Cast", "shape", "float"), ("Cast", "float", "whole")):
        kinds = {"to": TensorProto.FLOAT if after == "float" else TensorProto.INT64} if op == "Cast" else {}
        model.graph.node.append(helper.make_node(op, [before], [after], **kinds))
    model.graph.node.append(helper.make_node("Reshape", ["output", "whole"], ["features"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("features", TensorProto.FLOAT, None))
    path = tmp_path / "net.onnx"
    onnx.save(model, str(path))
    with pytest.raises(SourceRefused, match=r"2 outputs that could be the embedding \(features, second\)"):
        run_import(path)
    assert run_import(path, output="features").dim == 512


def test_weights_beside_a_file_count_in_its_digest_wherever_they_are_named(tmp_path: Path) -> None:
    model, digests = tiny_net(), []
    tensor = next(t for t in model.graph.initializer if t.name == "fc_w")
    constant = helper.make_node("Constant", [], ["fc_w"], value=tensor)
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, constant)
    values = numpy_helper.to_array(tensor).copy()
    held = model.graph.node[0].attribute[0].t
    held.ClearField("raw_data")
    held.data_location = TensorProto.EXTERNAL
    held.external_data.add(key="location", value="net.bin")
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    for number in (1, 2):
        (tmp_path / "net.bin").write_bytes((values * number).tobytes())
        digests.append(file_digest(tmp_path / "net.onnx"))
    assert digests[0] != digests[1]  # else two networks would have one contract id
    (tmp_path / "net.bin").unlink()
    with pytest.raises(SourceRefused, match=r"expected net\.bin beside it"):
        run_import(tmp_path / "net.onnx")


def test_a_projection_that_keeps_lengths_is_no_training_head(tmp_path: Path) -> None:
    model = tiny_net()
    rotation = np.linalg.qr(np.random.default_rng(0).normal(0, 1, (512, 512)))[0][:, :256].astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(rotation, "pca"))
    model.graph.node[-1].output[0] = "features"
    model.graph.node.append(helper.make_node("MatMul", ["features", "pca"], ["output"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 256]))
    path = tmp_path / "net.onnx"
    onnx.save(model, str(path))
    assert run_import(path).dim == 256


def test_a_form_for_the_cpu_that_fails_does_not_stop_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: onnx.ModelProto) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(forms, "blocked_layout", broken)
    path = tmp_path / "net.onnx"
    onnx.save(tiny_net(), str(path))
    manifest = run_import(path)
    assert manifest.cpu is None
    assert manifest.steps[-1]["why"] == "not for this network: RuntimeError: no such luck"
    assert not (tmp_path / "models/net/serving_cpu.onnx").exists()


def with_function(*, endless: bool) -> onnx.ModelProto:
    """The normalisation as a function of the file; `endless`: it calls itself."""
    model = tiny_net()
    nodes = [helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.float32(127.5)))]
    nodes += [helper.make_node("Sub", ["x", "half"], ["d"]), helper.make_node("Div", ["d", "half"], ["y"])]
    if endless:
        nodes = [helper.make_node("Normalise", ["x"], ["y"], domain="own")]
    model.functions.append(helper.make_function("own", "Normalise", ["x"], ["y"], nodes, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    for node in model.graph.node:
        node.input[:] = ["normal" if name == "input.1" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Normalise", ["input.1"], ["normal"], domain="own"))
    return model


def test_a_function_of_the_file_is_written_out_and_read(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(with_function(endless=False), str(path))
    manifest = run_import(path)
    assert manifest.preprocessing["network"] == {"color": "rgb", "mean": [127.5] * 3, "std": [127.5] * 3}
    assert cosine_to(tiny_net(), Preprocessing(), embed(tmp_path / "models/net/serving.onnx")) >= 0.99999


def quantised() -> onnx.ModelProto:
    model = tiny_net()
    for name, value in (("qs", np.float32(0.1)), ("qz", np.uint8(128))):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    for node in model.graph.node:
        node.input[:] = ["dq" if name == "input.1" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["input.1", "qs", "qz"], ["q"]))
    model.graph.node.insert(1, helper.make_node("DequantizeLinear", ["q", "qs", "qz"], ["dq"]))
    return model


def optimised(folder: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(tiny_net().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(str(folder / "optimised.onnx"))


OTHER = {
    "int8": (
        lambda folder: quantised(),
        "net.onnx is already quantised (DequantizeLinear, QuantizeLinear): expected the original float file. Import "
        "that, then make int8 from it: arcface quantize",
    ),
    "functions without end": (
        lambda folder: with_function(endless=True),
        "net.onnx defines functions that call themselves (Normalise): expected none. Export it again.",
    ),
    "a training head": (
        lambda folder: tiny_net(dim=10_000),
        "net.onnx gives 10000 numbers per face (a training head's classes?): expected an embedding of 128, 256 or 512. "
        "Import the recognition ONNX itself.",
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_file_that_is_something_else_is_named_with_what_to_import_instead(what: str, tmp_path: Path) -> None:
    make, message = OTHER[what]
    path = tmp_path / "net.onnx"
    onnx.save(make(tmp_path), str(path))
    with pytest.raises(SourceRefused) as caught:
        run_import(path)
    assert str(caught.value) == message


def test_a_serving_onnx_of_ours_names_its_source(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(tiny_net(), str(path))
    run_import(path)
    with pytest.raises(SourceRefused, match=r"is a serving ONNX made by an import: .* Import the source\.onnx"):
        run_import(tmp_path / "models" / "net" / "serving.onnx")


def test_a_file_that_onnx_runtime_optimised_for_a_cpu_is_named(tmp_path: Path) -> None:
    model = optimised(tmp_path)
    if not any(node.domain == "com.microsoft.nchwc" for node in model.graph.node):
        pytest.skip("this CPU has no blocked layout")
    with pytest.raises(SourceRefused, match=r"optimised by ONNX Runtime for one CPU .*expected the original file"):
        run_import(tmp_path / "optimised.onnx")


def test_an_ort_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.ort"
    path.write_bytes(b"\x20\x00\x00\x00ORTM" + bytes(100))
    with pytest.raises(SourceRefused, match=r"net\.ort is an \.ort file .*Import the ONNX that it was made from"):
        run_import(path)


def test_a_stated_neutral_preprocessing_is_taken_for_whole_pixels(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(takes_uint8(), str(path))
    manifest = run_import(path, stated=Stated("bgr", (0, 0, 0), (1, 1, 1)))
    assert manifest.wants() == Preprocessing("bgr", (0, 0, 0), (1, 1, 1))
