"""`arcface compare` on engines, files, saved embeddings and a real server, and layer by layer."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper

from arcface_build.commands.compare import command
from arcface_build.compare.comparison import Faces
from arcface_clients.errors import ContractMismatch, Missing, WrongUse
from arcface_clients.faces.synthetic import synthetic_people
from damaged_arrays import DAMAGED_ARRAYS, write_damaged


@pytest.fixture(scope="module")
def model(demo_repository: Path) -> Path:
    return next((demo_repository.parent / "models").glob("*/source.onnx")).parent


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six synthetic people with three views each: PERSON/VIEW.png."""
    import cv2

    folder = tmp_path_factory.mktemp("people")
    for person, views in enumerate(synthetic_people(6, 3)):
        (folder / f"p{person}").mkdir()
        for number, face in enumerate(views):
            cv2.imwrite(str(folder / f"p{person}" / f"{number}.png"), face)
    return folder


@pytest.fixture(scope="module")
def perturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The serving ONNX with one layer's weights changed by 1 %, and the tensor that this layer computes."""
    network = onnx.load(model / "serving.onnx")
    weights = [tensor for tensor in network.graph.initializer if len(tensor.dims) == 4][10]
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=tuple(weights.dims))
    weights.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(weights) * noise).astype(np.float32), weights.name))
    path = tmp_path_factory.mktemp("perturbed") / "serving.onnx"
    onnx.save(network, path)
    return path, next(node.output[0] for node in network.graph.node if weights.name in node.input)


def compare(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result


def test_insightface_and_onnx_runtime_agree_with_accuracy_and_no_changed_decision(model, people):
    result = compare(
        "insightface", "onnx", "--models-dir", model.parent, "--model", model.name,
        "--faces", people, "--identities", "--json",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert result.return_value == 0
    assert report["gate"] == {"max_drift": 1e-5, "passed": True}
    assert report["drift"]["min_cosine"] > 0.99999
    assert report["drift"]["worst_faces"][0]["name"].startswith("p"), "paths of this machine have no place in a report"
    assert report["accuracy"]["changed"]["changed"] == 0
    assert report["accuracy"]["a"]["genuine"] == 18


def test_a_server_is_compared_with_the_file_that_it_serves(model, server, people):
    result = compare(model / "serving.onnx", f"{server.grpc_url}/arcface", "--faces", people, "--n-samples", 5)
    assert result.return_value == 0
    assert "5 faces: cosine mean 1.0000000" in result.stdout


def test_the_layer_that_was_changed_by_one_percent_is_named(model, perturbed, people):
    changed, tensor = perturbed
    result = compare(
        model / "serving.onnx", changed, "--faces", people, "--layers", "--json",
        "--source", model / "source.onnx", "--explain",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["layers"]["first"]["tensor"] == tensor
    assert report["layers"]["first"]["relative"] == pytest.approx(0.01, rel=0.5)
    assert report["findings"][0]["fault"] == "weights or precision"
    assert f"the first that differs is {tensor} (Conv, relative error" in report["layers"]["told"]


def test_a_failed_gate_is_exit_code_1_and_names_the_fault(model, people, tmp_path):
    from arcface_build.compare.reference import reference_network
    from arcface_clients.contract import Preprocessing
    from arcface_clients.faces.images import load_faces

    faces, names, _ = load_faces([people])
    network, _ = reference_network(model / "source.onnx")
    swapped = network(Preprocessing("bgr").apply(faces))
    np.savez(tmp_path / "swapped.npz", embeddings=swapped / np.linalg.norm(swapped, axis=1)[:, None], paths=names)
    result = compare(model / "serving.onnx", tmp_path / "swapped.npz")  # the faces are found by the saved paths
    assert result.return_value == 1
    assert "gate        FAILED" in result.stdout
    assert "channels swapped: The channels are swapped: the network expects RGB and gets BGR." in result.stdout


def test_saved_embeddings_are_matched_by_name_not_by_row(tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    names = [f"/somewhere/p/{i}.jpg" for i in range(4)]
    np.savez(tmp_path / "a.npz", embeddings=rows, paths=names)
    np.savez(tmp_path / "b.npz", embeddings=rows[::-1], paths=[n.replace("somewhere", "else") for n in names[::-1]])
    result = compare(tmp_path / "a.npz", tmp_path / "b.npz")
    assert "4 faces: cosine mean 1.0000000" in result.stdout


def test_other_contracts_are_not_compared(tmp_path):
    rows = np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "a.npz", embeddings=rows, contract_id="a" * 64)
    np.savez(tmp_path / "b.npz", embeddings=rows, contract_id="b" * 64)
    with pytest.raises(ContractMismatch, match=r"has contract aaaaaaaaaaaa…, .* has bbbbbbbbbbbb….*--across-contracts"):
        compare(tmp_path / "a.npz", tmp_path / "b.npz")


def test_two_contracts_are_compared_where_that_is_asked_for_and_it_is_said_everywhere(tmp_path):
    rows = np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "a.npz", embeddings=rows, contract_id="a" * 64)
    np.savez(tmp_path / "b.npz", embeddings=rows, contract_id="b" * 64)
    options = ("--across-contracts", "--report", tmp_path / "r.json", "--html", tmp_path / "r.html")
    result = compare(tmp_path / "a.npz", tmp_path / "b.npz", *options)
    assert "WARNING: A and B have different contracts" in result.stderr
    assert json.loads((tmp_path / "r.json").read_text())["across_contracts"] is True
    assert "A and B have different contracts" in (tmp_path / "r.html").read_text()


def test_what_keeps_an_explanation_from_being_tried_is_said_with_what_to_give(tmp_path):
    rows = np.random.default_rng(0).normal(size=(12, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "b.npy", np.random.default_rng(1).permutation(64 * 12).reshape(12, 64) / 768 - 0.5)
    result = compare(tmp_path / "a.npy", tmp_path / "b.npy")
    assert result.return_value == 1
    assert "finding     another network: " in result.stdout
    assert (
        "explanation only the embeddings were checked; faults of the input need the network too. "
        "Give the faces: --faces FOLDER, and the source ONNX of A: --source models/NAME/source.onnx" in result.stdout
    )


def test_lengths_and_coarser_numbers_are_found_in_saved_embeddings_alone(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "long.npy", 3 * rows)
    np.save(tmp_path / "coarse.npy", rows + 0.012 * rng.normal(size=rows.shape))
    report = json.loads(compare(tmp_path / "a.npy", tmp_path / "long.npy", "--no-explain", "--json").stdout)
    assert [finding["fault"] for finding in report["findings"]] == ["not L2-normalised"]
    assert report["not_explained"] is None
    assert "same network, coarser numbers" in compare(tmp_path / "a.npy", tmp_path / "coarse.npy").stdout


def test_the_source_of_another_network_explains_nothing_and_that_is_said(model, people, tmp_path):
    from arcface_clients.faces.images import load_faces

    faces, names, _ = load_faces([people])
    rows = np.random.default_rng(0).normal(size=(2, len(faces), 512))
    for name, saved in zip(("a", "b"), rows, strict=True):
        np.savez(tmp_path / f"{name}.npz", embeddings=saved, paths=names)
    result = compare(tmp_path / "a.npz", tmp_path / "b.npz", "--source", model / "source.onnx")
    assert "explanation source.onnx is not the network of A" in result.stdout


@pytest.mark.parametrize("damage", DAMAGED_ARRAYS)
def test_damaged_embeddings_are_refused_in_one_sentence(tmp_path, damage):
    np.save(tmp_path / "a.npy", np.eye(2))
    with pytest.raises(WrongUse, match=r"b\.npz (is not a NumPy file, or truncated|contains )"):
        compare(tmp_path / "a.npy", write_damaged(tmp_path / "b.npz", damage))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("gone.npz", None, Missing, "does not exist"),
        ("text.npz", b"hello", WrongUse, "is not a NumPy file, or truncated"),
        ("text.onnx", b"hello", WrongUse, "is not an ONNX file"),
        ("photo.tiff", b"hello", WrongUse, "is neither .npz, .npy, .parquet, .onnx nor .plan, .engine"),
        ("sm86.plan", b"hello", Missing, "needs TensorRT and a GPU"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path, name, content, error, message):
    if name.endswith(".plan") and find_spec("tensorrt"):
        pytest.skip("TensorRT is here")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    np.save(tmp_path / "a.npy", np.eye(2))
    with pytest.raises(error, match=message):
        compare(tmp_path / "a.npy", path)


def test_layers_of_a_plan_are_refused_with_the_way_that_works(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(2))
    with pytest.raises(WrongUse, match=r"A plan's layers cannot be read: give the ONNX .* add --tensorrt"):
        compare(tmp_path / "a.npy", tmp_path / "a.npy", "--layers")


def test_a_sample_is_spread_over_all_faces():
    faces = Faces(np.arange(10), tuple("abcdefghij"))
    assert faces.sample(4).names == ("a", "d", "g", "j")
    assert faces.sample(None) is faces.sample(99) is faces


def test_embeddings_of_two_widths_are_named_with_their_files(tmp_path):
    for name, width in (("a.npz", 64), ("b.npz", 32)):
        np.savez(tmp_path / name, embeddings=np.ones((3, width), np.float32))
    with pytest.raises(WrongUse, match=r"/a\.npz holds embeddings of 64 numbers, .*/b\.npz of 32: they come from"):
        compare(tmp_path / "a.npz", tmp_path / "b.npz")
