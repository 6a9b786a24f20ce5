"""Weights in the model repository: versions, overlays, going back, and what is left when a copy fails."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from arcface_build.repository.find import find_repository
from arcface_build.repository.install import install, roll_back
from arcface_build.repository.versions import served_manifest, versions
from arcface_clients.errors import Missing, WrongUse
from conftest import REPO


def manifest(name: str) -> dict:
    return {"name": name, "contract_id": f"id-of-{name}", "precision": "fp32", "source": {"sha256": "0" * 64}}


@pytest.fixture
def leaf(tmp_path):
    """A repository with one leaf model and a file to install."""
    folder = tmp_path / "model_repository" / "arcface_onnx"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text('name: "arcface_onnx"\nmax_batch_size: 64\n')
    weights = tmp_path / "weights.onnx"
    weights.write_bytes(b"weights")
    return folder.parent, {"model.onnx": weights}


def test_the_first_weights_go_into_version_1_and_the_same_again_changes_nothing(leaf):
    repository, files = leaf
    assert install(repository, "arcface_onnx", files, manifest("a")) == 1
    assert install(repository, "arcface_onnx", files, manifest("a")) == 1
    assert (repository / "arcface_onnx" / "1" / "model.onnx").read_bytes() == b"weights"


def test_other_weights_become_the_next_version_with_code_carried_over(leaf):
    repository, files = leaf
    (repository / "arcface_onnx" / "1" / "model.py").write_text("# code")
    install(repository, "arcface_onnx", files, manifest("a"))
    assert install(repository, "arcface_onnx", files, manifest("b")) == 2
    assert (repository / "arcface_onnx" / "2" / "model.py").read_text() == "# code"
    assert served_manifest(repository)["name"] == "b"


def test_going_back_serves_the_version_before_with_its_contract_id(leaf):
    repository, files = leaf
    for name in ("a", "b"):
        install(repository, "arcface_onnx", files, manifest(name))
    assert roll_back(repository, "arcface_onnx") == (2, 1)
    assert versions(repository / "arcface_onnx") == [1]
    assert "id-of-a" in (repository / "arcface_onnx" / "configs" / "onnx.pbtxt").read_text()
    with pytest.raises(WrongUse, match="arcface_onnx has 1 version: expected at least two for a rollback"):
        roll_back(repository, "arcface_onnx")


def test_a_real_model_takes_demo_weights_out_of_the_way_of_a_rollback(leaf):
    repository, files = leaf
    for name in ("demo", "demo-r18"):
        install(repository, "arcface_onnx", files, {**manifest(name), "source": {"sha256": "0" * 64, "kind": "demo"}})
    assert versions(repository / "arcface_onnx") == [1, 2]
    assert install(repository, "arcface_onnx", files, manifest("own")) == 3
    with pytest.raises(WrongUse, match="arcface_onnx has 1 version"):
        roll_back(repository, "arcface_onnx")
    install(repository, "arcface_onnx", files, manifest("better"))
    assert roll_back(repository, "arcface_onnx") == (4, 3)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("{", "cannot be read"), ("[]", "is not a version's manifest: it lacks contract_id, name, source")],
)
def test_a_manifest_that_cannot_be_read_is_named_and_mended_by_an_import(leaf, text, fault):
    repository, files = leaf
    install(repository, "arcface_onnx", files, manifest("a"))
    (repository / "arcface_onnx" / "1" / "manifest.json").write_text(text)
    with pytest.raises(Missing, match=f"manifest.json {fault}.*arcface import SOURCE.*arcface rollback"):
        served_manifest(repository)
    assert install(repository, "arcface_onnx", files, manifest("a")) == 2
    assert served_manifest(repository)["name"] == "a"


def test_a_copy_that_fails_leaves_no_version_behind(leaf, tmp_path):
    repository, files = leaf
    install(repository, "arcface_onnx", files, manifest("a"))
    with pytest.raises(FileNotFoundError):
        install(repository, "arcface_onnx", {"model.onnx": tmp_path / "absent.onnx"}, manifest("b"))
    assert sorted(p.name for p in (repository / "arcface_onnx").iterdir()) == ["1", "config.pbtxt", "configs"]


def test_a_folder_that_is_no_repository_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Missing, match=r"is not our model repository: expected arcface/config\.pbtxt in it"):
        find_repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Missing, match=r"no model_repository/ in .* or above it\. Make one here: arcface serve"):
        find_repository()


CONFIGS = [
    path for pattern in ("*/config.pbtxt", "*/configs/*.pbtxt") for path in REPO.glob(f"model_repository/{pattern}")
]


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=lambda p: f"{p.parts[-2]}-{p.name}")
def test_every_config_parses_as_tritons_own_message_and_bears_its_folders_name(path):
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    folder = path.parent if path.name == "config.pbtxt" else path.parent.parent
    assert config.name == folder.name
    assert config.max_batch_size == (0 if config.name.startswith("photo_") else 64)  # a photo is a request of its own


def test_no_plan_is_a_default_so_that_an_unmapped_gpu_fails_loudly():
    config = text_format.Parse(
        (REPO / "model_repository" / "arcface_trt" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    assert not config.default_model_filename
    assert config.cc_model_filenames["8.6"] == "sm86.plan"
    assert config.cc_model_filenames["12.0"] == "sm120.plan"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_no_model_has_a_queue_policy_because_triton_then_loses_wake_ups(path):
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    assert not config.dynamic_batching.HasField("default_queue_policy")
