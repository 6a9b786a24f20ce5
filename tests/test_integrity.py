"""What lies in a version folder or a model folder is what its manifest says, whichever command looks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arcface_build.repository.assemble import assemble, assemble_plans
from arcface_build.repository.detector import photo_models
from arcface_build.repository.install import install, roll_back
from arcface_build.repository.mend import mend
from arcface_build.repository.versions import check_served, served_folder, versions
from arcface_build.serving.host_checks import check_weights
from arcface_clients.config.schema import EmbeddingConfig
from arcface_clients.contract import Preprocessing, contract_id
from arcface_clients.engines.onnx import OnnxEngine
from arcface_clients.engines.onnx_contract import contract_in
from arcface_clients.errors import ContractMismatch, GateFailed
from arcface_clients.plans.manifest import manifest_path
from conftest import copy_repository
from plan_samples import in_cache
from tiny_model import write_model


@pytest.fixture
def model_dir(tmp_path):
    return write_model(tmp_path / "models" / "tiny")


@pytest.fixture
def other_dir(tmp_path):
    return write_model(tmp_path / "models" / "other", seed=1)


@pytest.fixture
def repository(tmp_path, model_dir):
    repository = copy_repository(tmp_path)
    assemble(model_dir, repository)
    return repository


def edit(manifest, **changed) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changed}))


def exchanged(version, other_dir) -> None:
    shutil.copyfile(other_dir / "serving.onnx", version / "model.onnx")


def other_contract(version, other_dir) -> None:
    edit(version / "manifest.json", contract_id="2" * 64)


def other_precision(version, other_dir) -> None:
    edit(version / "manifest.json", precision="int8")


def gone(version, other_dir) -> None:
    (version / "model.onnx").unlink()


def exchanged_before_digests_were_kept(version, other_dir) -> None:
    manifest = json.loads((version / "manifest.json").read_text())
    (version / "manifest.json").write_text(json.dumps({k: manifest[k] for k in manifest if k not in ("files", "seal")}))
    exchanged(version, other_dir)


DAMAGE = {
    exchanged: r"model\.onnx was changed: expected sha256 \w{12}…, got \w{12}…",
    other_contract: r"its manifest\.json was edited",
    other_precision: r"its manifest\.json was edited",
    gone: r"model\.onnx is gone",
    exchanged_before_digests_were_kept: r"model\.onnx names contract \w{12}…, its manifest\.json \w{12}…",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_version_changed_by_hand_is_refused_named_and_mended_by_assemble(repository, model_dir, other_dir, damage):
    check_served(repository, "arcface_onnx")
    damage(served_folder(repository, "arcface_onnx"), other_dir)
    with pytest.raises(GateFailed, match=rf"arcface_onnx/1 is not what was installed: {DAMAGE[damage]}\. Install"):
        check_served(repository, "arcface_onnx")
    check = check_weights(EmbeddingConfig(local={"model_repository": repository}))
    assert check.status == "problem" and "arcface_onnx/1 is not what was installed" in check.found
    overlay = repository / "arcface_onnx" / "configs" / "onnx.pbtxt"
    described = overlay.read_text()
    assert mend(repository) == [] and overlay.read_text() == described
    assert assemble(model_dir, repository)["arcface_onnx"] == 2
    check_served(repository, "arcface_onnx")


def test_rollback_refuses_to_go_back_to_a_version_that_was_changed(repository, model_dir, other_dir):
    assemble(other_dir, repository)
    exchanged(repository / "arcface_onnx" / "1", other_dir)
    with pytest.raises(GateFailed, match="arcface_onnx/1 is not what was installed"):
        roll_back(repository, "arcface_onnx")
    assert versions(repository / "arcface_onnx") == [1, 2]


def test_a_rolled_back_version_is_still_what_was_installed(repository, model_dir, other_dir):
    assemble(other_dir, repository)
    roll_back(repository, "arcface_onnx")
    check_served(repository, "arcface_onnx")
    assert assemble(model_dir, repository)["arcface_onnx"] == 1


def test_a_manifest_with_another_contract_than_its_onnx_is_refused_by_assemble_and_the_engine(repository, model_dir):
    assert contract_in(model_dir / "source.onnx") is None
    other = contract_id("6" * 64, Preprocessing(), 64)
    edit(model_dir / "manifest.json", source={"sha256": "6" * 64}, contract_id=other)  # of another import
    expected = rf"serving\.onnx names contract \w{{12}}… in its answers, the manifest of tiny {other[:12]}…"
    with pytest.raises(ContractMismatch, match=expected):
        assemble(model_dir, repository)
    with pytest.raises(ContractMismatch, match=expected), OnnxEngine(models_dir=model_dir.parent) as engine:
        engine.ensure_ready()


def detector_exchanged(version) -> None:
    (version / "detector.onnx").write_bytes(b"another detector")


def detectors_manifest_edited(version) -> None:
    edit(version / "manifest.json", name="a better one")


def detectors_manifest_cut_off(version) -> None:
    (version / "manifest.json").write_text('{"name": "yu')


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (detector_exchanged, "photo_faces/1 is not what was installed: detector.onnx was changed"),
        (detectors_manifest_edited, "photo_faces/1 is not what was installed: its manifest.json was edited"),
        (detectors_manifest_cut_off, "photo_faces/1/manifest.json cannot be read"),
    ],
)
def test_a_detector_that_is_not_what_was_installed_is_not_served_and_named_by_doctor(
    repository, tmp_path, damage, what
):
    (tmp_path / "yunet.onnx").write_bytes(b"a detector")
    told = {"name": "yunet", "source": {"kind": "detector"}}
    install(repository, "photo_faces", {"detector.onnx": tmp_path / "yunet.onnx"}, told)
    settings = EmbeddingConfig(local={"model_repository": repository})
    assert photo_models(repository)[0] == ["photo_faces", "photo_verify"]
    assert check_weights(settings).found.endswith("photo_faces version 1")
    damage(repository / "photo_faces" / "1")
    models, why = photo_models(repository)
    assert models == [] and what in why
    assert why.endswith(
        "Install it again: arcface import-detector FILE, or go back: arcface rollback --model photo_faces"
    )
    check = check_weights(settings)
    assert check.status == "problem" and what in check.found and "arcface import-detector FILE" in check.fix


@pytest.mark.parametrize("content", [b"", b"\x08\x08truncated", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 40])
def test_a_file_that_is_no_onnx_names_no_contract(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    assert contract_in(tmp_path / "model.onnx") is None


def test_the_contract_is_found_in_a_file_cut_off_behind_it_or_not_at_all(model_dir, tmp_path):
    whole = (model_dir / "serving.onnx").read_bytes()
    named = contract_in(model_dir / "serving.onnx")
    assert named == json.loads((model_dir / "manifest.json").read_text())["contract_id"][:32]
    for length in range(0, len(whole), max(len(whole) // 50, 1)):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        assert contract_in(tmp_path / "cut.onnx") in (None, named)


@pytest.fixture
def with_plan(tmp_path, model_dir, repository):
    """A version of arcface_trt; gives its folder, and assembles it again."""
    contract = json.loads((model_dir / "manifest.json").read_text())["contract_id"]
    plan = in_cache(tmp_path / "cache", contract_id=contract, drift={"max_drift": 1e-4, "faces": 64}).path
    assemble_plans(model_dir, [plan], repository)
    return repository / "arcface_trt" / "1", lambda: assemble_plans(model_dir, [plan], repository)


def plan_of_another_model(version, cache) -> None:
    other = in_cache(cache, seed=1, contract_id="2" * 64, drift={"max_drift": 1e-4, "faces": 64}).path
    shutil.copyfile(other, version / "sm86.plan")
    shutil.copyfile(manifest_path(other), version / "sm86.plan.json")


def plan_cut_off(version, cache) -> None:
    (version / "sm86.plan").write_bytes((version / "sm86.plan").read_bytes()[:-1])


def plan_put_there(version, cache) -> None:
    shutil.copyfile(version / "sm86.plan", version / "sm89.plan")


PLAN_DAMAGE = {
    plan_of_another_model: r"sm86\.plan was changed",
    plan_cut_off: r"sm86\.plan was changed",
    plan_put_there: r"sm89\.plan was added",
}


@pytest.mark.parametrize("damage", PLAN_DAMAGE, ids=lambda damage: damage.__name__)
def test_a_plan_that_was_not_installed_is_refused_and_mended_by_assemble(repository, with_plan, tmp_path, damage):
    version, again = with_plan
    check_served(repository, "arcface_trt")
    assert again() == 1
    damage(version, tmp_path / "other")
    with pytest.raises(GateFailed, match=rf"arcface_trt/1 is not what was installed: {PLAN_DAMAGE[damage]}"):
        check_served(repository, "arcface_trt")
    assert again() == 2
    check_served(repository, "arcface_trt")


def test_weights_that_lie_beside_those_installed_are_refused(repository):
    version = served_folder(repository, "arcface_onnx")
    shutil.copyfile(version / "model.onnx", version / "another.onnx")
    with pytest.raises(GateFailed, match=r"arcface_onnx/1 is not what was installed: another\.onnx was added"):
        check_served(repository, "arcface_onnx")


def test_weights_of_no_version_are_not_taken_for_those_of_the_first(repository, model_dir):
    version = repository / "arcface_onnx" / "1"
    (version / "manifest.json").unlink()
    (version / "model.onnx").rename(version / "model.gpu.onnx")
    assert assemble(model_dir, repository)["arcface_onnx"] == 1
    check_served(repository, "arcface_onnx")


@pytest.mark.parametrize("leaf", ["arcface_onnx", "arcface_reference"])
@pytest.mark.parametrize("later", [False, True], ids=["the only version", "a later version"])
def test_a_manifest_that_cannot_be_read_is_told_and_mended_by_assemble(repository, model_dir, other_dir, leaf, later):
    if later:
        assemble(other_dir, repository)
    version = served_folder(repository, leaf)
    (version / "manifest.json").write_text('{"name": "ti')
    check = check_weights(EmbeddingConfig(local={"model_repository": repository}))
    assert check.status == "problem" and f"{version}/manifest.json cannot be read" in check.found
    assert "arcface import SOURCE" in check.fix
    assemble(model_dir, repository)
    for name in ("arcface_onnx", "arcface_reference"):
        check_served(repository, name)
    check = check_weights(EmbeddingConfig(local={"model_repository": repository}))
    assert check.fix.startswith("it is not served, and arcface rollback refuses it; to forget it: rm ")
    Path(check.fix.partition(" rm ")[2]).unlink()
    assert check_weights(EmbeddingConfig(local={"model_repository": repository})).status == "ok"
