"""Import: every flavour becomes the same serving form, equal to its reference; a refusal leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from arcface_build.errors import ProofFailed, SourceRefused
from arcface_build.imports.importing import existing_import, import_model
from arcface_build.imports.preprocessing import Stated
from arcface_build.imports.proof import Reference, prove, reference_embeddings
from arcface_build.imports.proof_faces import ProofFaces
from arcface_build.imports.source import known_models, resolve
from arcface_build.repository.assemble import assemble
from arcface_clients.contract import Preprocessing, contract_id, contract_prefix
from arcface_clients.engines.import_manifest import ImportManifest, read_import_manifest
from arcface_clients.engines.registry import EngineRegistry
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import copy_repository
from tiny_model import write_manifest
from tiny_nets import tiny_net

FLAVOURS = {
    "dynamic": {},
    "batch fixed to 1": {"batch": 1},
    "batch fixed to 1 in a Reshape, too": {"batch": 1, "baked_reshape": 1},
    "batch fixed to 4 in a Reshape, too": {"batch": 4, "baked_reshape": 4},
    "batch named None": {"batch": "None"},
    "batch named None over a baked Reshape": {"batch": "None", "baked_reshape": 1},
    "batch unnamed": {"batch": None},
    "Reshape to -1": {"batch": 1, "baked_reshape": -1},
    "normalised inside, MXNet names": {"inside": "mxnet"},
    "normalised inside, PyTorch names": {"inside": "pytorch"},
    "opset 8, MXNet": {"opset": 8, "mxnet": True, "inside": "mxnet", "batch": 1, "slope_shape": "[C]"},
    "opset 11": {"opset": 11},
    "opset 13": {"opset": 13, "batch": 1},
    "opset 20": {"opset": 20},
    "NHWC": {"nhwc": True},
    "open image size": {"sides": ("height", "width")},
    "128-d": {"dim": 128},
    "256-d": {"dim": 256},
    "input named face": {"input_name": "face"},
    "input named data": {"input_name": "data"},
    "embedding as a 1×1 map": {"map_output": True},
    "BatchNorm before convolutions": {"bn_before_conv": True},
}


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return synthetic_faces(16)  # the command asks for 64; flavours differ on any face


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, str(path))
    return path


def run_import(path: Path, faces: np.ndarray, stated: Stated | None = None) -> ImportManifest:
    folder = path.parent / "models" / path.stem
    source = resolve(str(path), path.parent, known=known_models())
    return import_model(source, folder, ProofFaces(faces, "synthetic"), stated=stated)


def assert_reference_answers_for_what_it_says(path: Path) -> None:
    """arcface_reference asks one by one where the batch is 1, and for all faces at once else."""
    source = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (face,) = source.get_inputs()
    count = 1 if face.shape[0] == 1 else 3
    embeddings = source.run(None, {face.name: np.zeros((count, 3, 112, 112), np.float32)})[0]
    assert embeddings.ndim == 2 and len(embeddings) == count


@pytest.mark.parametrize("name", FLAVOURS)
def test_each_flavour_becomes_the_serving_form(name: str, tmp_path: Path, faces: np.ndarray) -> None:
    asked = "bn_before_conv" in FLAVOURS[name]  # the first one's statistics are of normalised pixels
    stated = Stated("rgb", (127.5,) * 3, (127.5,) * 3) if asked else None
    manifest = run_import(save(tiny_net(**FLAVOURS[name]), tmp_path / "net.onnx"), faces, stated)
    folder = tmp_path / "models" / "net"
    session = onnxruntime.InferenceSession(str(folder / "serving.onnx"), providers=["CPUExecutionProvider"])
    (face,), (embedding, norm, contract) = session.get_inputs(), session.get_outputs()
    dim = FLAVOURS[name].get("dim", 512)
    assert (face.name, face.type, face.shape) == ("face", "tensor(uint8)", ["N", 112, 112, 3])
    assert (embedding.name, embedding.type, embedding.shape) == ("embedding", "tensor(float)", ["N", dim])
    assert (norm.name, norm.type, norm.shape) == ("norm", "tensor(float)", ["N", 1])
    assert (contract.name, contract.type, contract.shape) == ("contract", "tensor(int32)", ["N", 4])
    assert manifest.serving["opset"] >= 17
    assert manifest.proof["min_cosine"] >= 0.99999
    assert_reference_answers_for_what_it_says(folder / "source.onnx")
    rows, norms, contracts = session.run(None, {"face": faces[:5]})
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    raw = reference_embeddings(Reference(folder / "source.onnx", manifest.wants()), faces[:5])
    np.testing.assert_allclose(norms[:, 0], np.linalg.norm(raw, axis=1), rtol=1e-4)
    assert {contract_prefix(row) for row in contracts} == {manifest.contract_id[:32]}
    files = ["manifest.json", "serving.onnx", "serving_cpu.onnx", "source.onnx"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert manifest.cpu["min_cosine"] >= 0.99999 and manifest.cpu["max_row_difference"] <= 1e-5


def test_preprocessing_inside_the_graph_is_found_even_where_insightface_would_miss_it(
    tmp_path: Path, faces: np.ndarray
) -> None:
    mxnet = run_import(save(tiny_net(inside="mxnet"), tmp_path / "mxnet.onnx"), faces)
    pytorch = run_import(save(tiny_net(inside="pytorch"), tmp_path / "pytorch.onnx"), faces)
    assert mxnet.wants() == pytorch.wants() == Preprocessing("rgb", (0, 0, 0), (1, 1, 1))
    assert mxnet.proof["reference"] == "insightface.get_feat"
    assert pytorch.proof["reference"] == "insightface.forward"
    assert "would take rgb, mean 127.5, std 127.5" in pytorch.proof["reference_why"]


@pytest.mark.parametrize(
    "stated",
    [
        Preprocessing("bgr", (127.5,) * 3, (128.0,) * 3),
        Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        Preprocessing("bgr", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),
    ],
)
def test_stated_preprocessing_is_what_the_graph_does(stated: Preprocessing, tmp_path: Path, faces: np.ndarray) -> None:
    path = save(tiny_net(), tmp_path / "net.onnx")
    manifest = run_import(path, faces, Stated(stated.color, stated.mean, stated.std))
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    serving = onnxruntime.InferenceSession(
        str(tmp_path / "models/net/serving.onnx"), providers=["CPUExecutionProvider"]
    )
    raw = plain.run(None, {"input.1": stated.apply(faces)})[0]
    expected = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(serving.run(None, {"face": faces})[0], expected, atol=2e-6)
    assert manifest.contract_id == contract_id(manifest.source["sha256"], stated, 512)


def test_the_reference_is_plain_onnx_runtime_where_insightface_is_not_installed(
    tmp_path: Path, faces: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "insightface.model_zoo.arcface_onnx", None)
    manifest = run_import(save(tiny_net(), tmp_path / "net.onnx"), faces)
    assert manifest.proof["reference"] == "onnxruntime"
    assert "InsightFace cannot be imported" in manifest.proof["reference_why"]


def test_a_graph_that_mixes_faces_of_a_batch_is_refused_and_nothing_is_left(tmp_path: Path, faces: np.ndarray) -> None:
    path = save(tiny_net(across_batch=True), tmp_path / "net.onnx")
    with pytest.raises(
        ProofFailed, match=r"the faces of a batch affect each other: row . of 2 differs from its single run"
    ):
        run_import(path, faces)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["net.onnx"]


def test_the_colour_alone_answers_a_question_about_the_colour(tmp_path: Path, faces: np.ndarray) -> None:
    path = save(tiny_net(inside="mxnet"), tmp_path / "net.onnx")
    manifest = run_import(path, faces, Stated("bgr"))
    assert manifest.wants() == Preprocessing("bgr", (0, 0, 0), (1, 1, 1))
    assert manifest.preprocessing["why"] == (
        "the graph itself maps pixels 0..255 to -0.9961..0.9961; stated by the caller"
    )
    assert manifest.preprocessing["stated"] == {"color": "bgr"}


def test_double_normalisation_is_refused(tmp_path: Path, faces: np.ndarray) -> None:
    path = save(tiny_net(inside="mxnet"), tmp_path / "net.onnx")
    with pytest.raises(WrongUse, match="normalises inside its graph: expected --mean 0 --std 1, got mean"):
        run_import(path, faces, Stated(None, (127.5,) * 3, (127.5,) * 3))


def test_a_graph_that_only_half_normalises_asks_for_flags(tmp_path: Path, faces: np.ndarray) -> None:
    path = save(tiny_net(inside="half"), tmp_path / "net.onnx")
    with pytest.raises(SourceRefused, match=r"the graph maps pixels 0..255 to -1..509"):
        run_import(path, faces)
    manifest = run_import(path, faces, Stated("rgb", (0, 0, 0), (255, 255, 255)))
    assert manifest.preprocessing["why"] == "stated by the caller"
    assert manifest.preprocessing["network"] == {"color": "rgb", "mean": [127.5] * 3, "std": [127.5] * 3}


def test_the_copy_of_the_source_is_the_file_itself_unless_it_had_to_be_repaired(
    tmp_path: Path, faces: np.ndarray
) -> None:
    plain = save(tiny_net(), tmp_path / "plain.onnx")
    manifest = run_import(plain, faces)
    copy = (tmp_path / "models/plain/source.onnx").read_bytes()
    assert manifest.source["copy"]["exact"] and copy == plain.read_bytes()
    assert manifest.source["sha256"] == hashlib.sha256(copy).hexdigest()
    old = save(tiny_net(mxnet=True, opset=8, batch=1, slope_shape="[C]"), tmp_path / "old.onnx")
    manifest = run_import(old, faces)
    assert not manifest.source["copy"]["exact"]
    assert manifest.steps[0]["why"] == (
        "BatchNormalization spatial=0 with one scale per channel set to spatial=1 (5 nodes); "
        "Flatten inserted before 1 Gemm with rank-4 input; PRelu slopes [C] reshaped to [C,1,1] (3 nodes)"
    )


def test_weights_in_a_file_beside_it_are_part_of_the_digest(tmp_path: Path, faces: np.ndarray) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(tiny_net(), str(path), save_as_external_data=True, location="net.bin", size_threshold=1024)
    manifest = run_import(path, faces)
    joined = hashlib.sha256(path.read_bytes() + (tmp_path / "net.bin").read_bytes()).hexdigest()
    assert manifest.source["sha256"] == joined
    assert (tmp_path / "models/net/source.onnx").stat().st_size > (tmp_path / "net.bin").stat().st_size


def test_a_second_import_of_the_same_file_has_nothing_to_do(tmp_path: Path, faces: np.ndarray) -> None:
    path = save(tiny_net(), tmp_path / "net.onnx")
    manifest = run_import(path, faces)
    source = resolve(str(path), tmp_path, known=known_models())
    folder = tmp_path / "models" / "net"
    assert existing_import(folder, source, None) == manifest
    assert existing_import(folder, source, Stated("bgr")) is None
    (folder / "serving.onnx").write_bytes(b"damaged")
    assert existing_import(folder, source, None) is None


def test_variants_outlive_an_import_that_gives_the_same_serving_onnx(tmp_path: Path, faces: np.ndarray) -> None:
    path = save(tiny_net(), tmp_path / "net.onnx")
    run_import(path, faces)
    variants = tmp_path / "models" / "net" / "variants"
    variants.mkdir()
    (variants / "int8-cpu.json").write_text("{}")
    run_import(path, faces)
    assert (variants / "int8-cpu.json").read_text() == "{}"
    run_import(path, faces, Stated("bgr"))
    assert not variants.exists()


def test_a_manifest_that_cannot_be_used_says_why(tmp_path: Path, faces: np.ndarray) -> None:
    run_import(save(tiny_net(), tmp_path / "net.onnx"), faces)
    file = tmp_path / "models/net/manifest.json"
    data = json.loads(file.read_text())
    assert read_import_manifest(file.parent).to_json() == data
    file.write_text(json.dumps({**data, "format": 9}))
    with pytest.raises(WrongUse, match=r"has format 9: expected 1\. Import the model again: arcface import SOURCE\."):
        read_import_manifest(file.parent)
    del data["dim"]
    file.write_text(json.dumps(data))
    with pytest.raises(WrongUse, match=r"lacks dim\."):
        read_import_manifest(file.parent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"source": None}, "a field that cannot be read (TypeError"),
        ({"source": {}}, "a field that cannot be read (KeyError: 'sha256')"),
        ({"source": {"sha256": 7}}, "an invalid value in source.sha256"),
        ({"serving": {"file": None}}, "an invalid value in serving.file"),
        ({"preprocessing": {"color": "grey", "mean": [0, 0, 0], "std": [1, 1, 1]}}, "(ValueError: color is 'grey'"),
        ({"preprocessing": []}, "a field that cannot be read (TypeError"),
        ({"dim": "512"}, "an invalid value in dim"),
        ({"dim": True, "name": ""}, "an invalid value in name, contract_id, dim"),
    ],
)
def test_a_damaged_field_is_named_before_anybody_reads_it(tmp_path: Path, damage: dict, message: str) -> None:
    tmp_path.joinpath("tiny").mkdir()
    write_manifest(tmp_path / "tiny", "5" * 64, Preprocessing(), 512, **damage)
    with pytest.raises(WrongUse) as caught:
        read_import_manifest(tmp_path / "tiny")
    assert message in str(caught.value)
    assert str(caught.value).endswith("Import the model again: arcface import SOURCE.")


CHANGED_SINCE = "was changed since the import: contract_id is not that of source.sha256, preprocessing and dim"


@pytest.mark.parametrize(
    "changed",
    [
        {"contract_id": "c" * 64},
        {"dim": 256},
        {"source": {"sha256": "6" * 64}},
        {"preprocessing": {"color": "bgr", "mean": [127.5] * 3, "std": [127.5] * 3}},
        {"preprocessing": {"color": "rgb", "mean": [127.5] * 3, "std": [128] * 3}},
    ],
)
def test_what_a_contract_id_is_made_of_is_not_changed_under_it(tmp_path: Path, changed: dict) -> None:
    tmp_path.joinpath("tiny").mkdir()
    write_manifest(tmp_path / "tiny", "5" * 64, Preprocessing(), 512, **changed)
    with pytest.raises(WrongUse, match=CHANGED_SINCE):
        read_import_manifest(tmp_path / "tiny")


def test_an_import_whose_manifest_was_edited_answers_nobody_and_is_made_anew(tmp_path, faces) -> None:
    net = save(tiny_net(), tmp_path / "net.onnx")
    told = run_import(net, faces).to_json()
    file = tmp_path / "models/net/manifest.json"
    edited = {**told, "preprocessing": {**told["preprocessing"], "mean": [0.0, 0.0, 0.0]}}
    file.write_text(json.dumps(edited))
    for engine in ("onnx", "insightface"):
        embedder = EngineRegistry.get(engine, models_dir=tmp_path / "models", model="net")
        with pytest.raises(WrongUse, match=CHANGED_SINCE):
            embedder.encode(faces[:2])
    with pytest.raises(WrongUse, match=CHANGED_SINCE):
        assemble(file.parent, copy_repository(tmp_path))
    again = run_import(net, faces)
    assert again.contract_id == told["contract_id"] == read_import_manifest(file.parent).contract_id


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    tmp_path.joinpath("tiny").mkdir()
    write_manifest(tmp_path / "tiny", "5" * 64, Preprocessing(), 512, later="key")
    assert read_import_manifest(tmp_path / "tiny").dim == 512


def test_the_real_mobilefacenet_is_known_by_its_digest_and_equal_on_real_faces(
    assets: Path, lfw_faces: np.ndarray, tmp_path: Path
) -> None:
    source = resolve(str(assets / "models" / "MobileFaceNet.onnx"), tmp_path, known=known_models())
    manifest = import_model(source, tmp_path / "models" / "m", ProofFaces(lfw_faces[::4], "lfw"))
    assert source.name == "mobilefacenet" and manifest.source["licence"] == "Apache-2.0"
    assert manifest.wants() == Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert manifest.proof["faces"] == 100 and manifest.proof["min_cosine"] >= 0.99999
    assert manifest.proof["between_faces"] < 0.1
    assert manifest.dim == 128
    assert manifest.cpu is None  # it has neither PReLU nor BatchNormalization


def test_a_missing_model_is_refused_with_those_that_are_there(tmp_path):
    (tmp_path / "demo-mobile").mkdir()
    (tmp_path / "demo-mobile" / "manifest.json").write_text("{}")
    with pytest.raises(
        Missing, match=r"no imported model in .*/demo: expected manifest.json there \(.* contains demo-mobile\)"
    ):
        read_import_manifest(tmp_path / "demo")


def test_the_proof_covers_the_outputs_norm_and_contract(tmp_path: Path, faces: np.ndarray) -> None:
    manifest = run_import(save(tiny_net(dim=64), tmp_path / "net.onnx"), faces)
    folder = tmp_path / "models" / "net"
    reference = Reference(folder / "source.onnx", manifest.wants())
    raw = reference_embeddings(reference, faces)
    prove(folder / "serving.onnx", faces, raw, reference, "synthetic", contract=manifest.contract_id)
    with pytest.raises(ProofFailed, match="does not return ffff"):
        prove(folder / "serving.onnx", faces, raw, reference, "synthetic", contract="f" * 64)
    with pytest.raises(ProofFailed, match=r"`norm` of face \d+ is .*: expected"):
        prove(folder / "serving.onnx", faces, 2 * raw, reference, "synthetic", contract=manifest.contract_id)
