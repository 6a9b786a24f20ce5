"""A version's overlay states its outputs, and Triton is then spared the process that would complete its config."""

from __future__ import annotations

import json
import shutil

import pytest

from arcface_build.repository.overlays import write_overlays
from arcface_build.repository.stated import NO_COMPLETION, completion_options, outputs_pbtxt
from arcface_clients import TritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces
from conftest import REPO

WHOLE = 'input [ { name: "face" } ]\noutput [ { name: "embedding" } ]\n'
HALF = 'input [ { name: "face" } ]\n'


@pytest.fixture
def one_model(tmp_path):
    """one_model(config, overlay): a repository of one model with a version."""

    def make(config: str, overlay: str | None = None):
        folder = tmp_path / "repository" / "leaf"
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.onnx").write_bytes(b"")
        (folder / "config.pbtxt").write_text(config)
        if overlay is not None:
            (folder / "configs").mkdir()
            (folder / "configs" / "onnx.pbtxt").write_text(overlay)
        return folder.parent

    return make


@pytest.mark.parametrize(
    ("config", "overlay", "spared"),
    [
        (WHOLE, None, True),
        (HALF, None, False),
        (HALF, WHOLE, True),
        (WHOLE, HALF, False),
        ("# output [\n", None, False),
    ],
    ids=["whole", "half", "overlay-is-whole", "overlay-is-half", "only-in-a-comment"],
)
def test_completion_is_spared_where_what_is_loaded_states_everything(one_model, config, overlay, spared):
    assert completion_options(one_model(config, overlay), "onnx") == [NO_COMPLETION] * spared


def test_one_model_that_needs_completion_keeps_it_for_all(one_model):
    repository = one_model(WHOLE)
    shutil.copytree(repository / "leaf", repository / "other")
    assert completion_options(str(repository), "")
    (repository / "other" / "config.pbtxt").write_text(HALF)
    assert completion_options(str(repository), "") == []


@pytest.mark.parametrize(("code", "states"), [("this version's", True), ("a former one's", False)])
def test_a_reference_states_what_its_own_code_answers_with(tmp_path, code, states):
    version = tmp_path / "arcface_reference" / "1"
    version.mkdir(parents=True)
    text = (REPO / "model_repository" / "arcface_reference" / "1" / "model.py").read_text()
    (version / "model.py").write_text(text if states else text.replace('"contract"', '"of_old"'))
    assert ('name: "contract"' in outputs_pbtxt(version, {"dim": 512})) == states


def test_a_repository_that_cannot_be_read_here_is_completed_by_triton(tmp_path):
    assert completion_options("s3://http://127.0.0.1:9000/bucket/models", "onnx") == []
    assert completion_options(str(tmp_path), "onnx") == []


def test_weights_of_an_older_import_are_asked_by_triton(tmp_path):
    version = tmp_path / "arcface_onnx" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(b"names no contract")
    assert outputs_pbtxt(version, {"dim": 512}) == ""


def test_an_imported_model_is_served_without_completion_and_keeps_its_width(start_triton, demo_repository):
    server = start_triton(demo_repository, ["arcface", "arcface_parity"])
    with TritonEmbedder(server.grpc_url) as embedder:
        assert embedder.encode(synthetic_faces(2)).shape == (2, 512)
        assert embedder.served.outputs == ("embedding", "norm", "contract")
    log = server.log_path.read_text()
    assert json.dumps({"auto-complete-config": "false"})[1:-1].replace(" ", "") in log.replace(" ", "")


def test_an_output_that_somebody_wrote_is_not_stated_twice(demo_repository, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(demo_repository, repository)
    config = repository / "arcface_onnx" / "config.pbtxt"
    config.write_text(config.read_text() + 'output [ { name: "embedding" data_type: TYPE_FP32 dims: [ 512 ] } ]\n')
    write_overlays(repository)
    assert (repository / "arcface_onnx" / "configs" / "onnx.pbtxt").read_text().count("output [") == 1
