"""What passed its gate becomes a version of a served model; what did not, or is of another contract, is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from arcface_build.errors import ProofFailed
from arcface_build.repository.assemble import assemble, assemble_plans
from arcface_build.repository.versions import served_folder, served_manifest, versions
from arcface_build.variants.choose import Choice
from arcface_clients.errors import Missing, PlanRefused
from arcface_clients.plans.manifest import manifest_bytes, manifest_path
from conftest import copy_repository
from plan_samples import spec, write_plan
from tiny_model import write_model


@pytest.fixture
def model_dir(tmp_path):
    return write_model(tmp_path / "models" / "tiny")


@pytest.fixture
def repository(tmp_path):
    return copy_repository(tmp_path)


def contract_of(model_dir) -> str:
    return json.loads((model_dir / "manifest.json").read_text())["contract_id"]


def plan(folder, contract, sm="8.6", precision="fp16", drift=1e-4, seed=0):
    """A plan of random bytes with a manifest of this contract and drift."""
    of = spec(sm=sm, precision=precision)
    path = folder / of.file_name
    manifest = replace(write_plan(path, of, seed=seed), contract_id=contract, drift=drift and {"max_drift": drift})
    manifest_path(path).write_bytes(manifest_bytes(manifest))
    return path


def judged(precision, drift, runtime="openvino-bf16", passed=True):
    """What a sidecar says of a variant."""
    gates = [{"runtime": runtime, "passed": passed, "limit": 0.01, "drift": {"max_drift": drift}}]
    return {"format": 1, "precision": precision, "passed": passed, "gates": gates}


def overlay(repository, model) -> str:
    return (repository / model / "configs" / "onnx.pbtxt").read_text()


def test_an_imported_model_is_installed_with_its_reference(model_dir, repository):
    assert assemble(model_dir, repository) == {"arcface_reference": 1, "arcface_onnx": 1}
    assert (repository / "arcface_reference" / "1" / "source.onnx").is_file()
    assert contract_of(model_dir) in overlay(repository, "arcface_onnx")


def test_a_variant_brings_its_precision_and_its_accelerator(model_dir, repository):
    choice = Choice("serving.onnx", "bf16", "openvino-bf16", "fastest", judged("bf16", 8e-4))
    assemble(model_dir, repository, choice)
    told = overlay(repository, "arcface_onnx")
    assert 'key: "precision" value: { string_value: "bf16" }' in told
    assert 'name: "openvino" parameters { key: "precision" value: "bf16" }' in told
    assert served_manifest(repository)["variant"]["runtime"] == "openvino-bf16"


def test_going_back_from_a_variant_takes_its_accelerator_away(model_dir, repository):
    from arcface_build.repository.versions import roll_back

    assemble(model_dir, repository)
    assemble(model_dir, repository, Choice("serving.onnx", "bf16", "openvino-bf16", "", judged("bf16", 8e-4)))
    assert roll_back(repository, "arcface_onnx") == (2, 1)
    assert "openvino" not in overlay(repository, "arcface_onnx")


def test_serve_does_not_bring_back_what_was_rolled_back(model_dir, repository):
    from arcface_build.repository.versions import roll_back
    from arcface_build.serving.variant import take_best_variant

    assemble(model_dir, repository)
    assemble(model_dir, repository, Choice("serving.onnx", "bf16", "openvino-bf16", "", judged("bf16", 8e-4)))
    roll_back(repository, "arcface_onnx")
    before = served_manifest(repository)
    said = take_best_variant(repository, model_dir.parent)
    name = before["name"]
    assert said == f"fp32 as installed: arcface rollback went back to it (another one: arcface assemble {name})"
    assert served_manifest(repository) == before
    assert assemble(model_dir, repository)["arcface_onnx"] == 1, "the same weights are no new version"


def test_a_variant_that_was_refused_is_not_installed(model_dir, repository):
    choice = Choice("variants/int8-cpu.onnx", "int8", "openvino-bf16", "", judged("int8", 0.03, passed=False))
    with pytest.raises(
        ProofFailed, match=r"variants/int8-cpu\.onnx of tiny has not passed its gate: drift 0\.03, 3\.0 × the 0\.01"
    ):
        assemble(model_dir, repository, choice)
    assert versions(repository / "arcface_onnx") == []


def test_plans_become_one_version_named_by_sm_and_others_of_the_contract_stay(model_dir, repository, tmp_path):
    contract = contract_of(model_dir)
    assert (
        assemble_plans(model_dir, [plan(tmp_path, contract, "8.6"), plan(tmp_path, contract, "12.0")], repository) == 1
    )
    assert assemble_plans(model_dir, [plan(tmp_path, contract, "9.0", seed=1)], repository) == 2
    folder = served_folder(repository, "arcface_trt")
    assert sorted(p.name for p in folder.glob("*.plan")) == ["sm120.plan", "sm86.plan", "sm90.plan"]
    assert 'key: "precision" value: { string_value: "fp16" }' in overlay(repository, "arcface_trt")


def test_a_plan_of_another_contract_is_refused(model_dir, repository, tmp_path):
    with pytest.raises(PlanRefused, match=r"tiny-fp16-sm86\.plan is of contract ffffffffffff…, expected that of tiny"):
        assemble_plans(model_dir, [plan(tmp_path, "f" * 64)], repository)


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        (None, r"tiny-fp16-sm86\.plan is refused: its drift was never measured\. Build it again"),
        (0.002, r"tiny-fp16-sm86\.plan is refused: drift 0\.002, 2\.0 × the 0\.001 that fp16 may show"),
        (float("nan"), r"tiny-fp16-sm86\.plan is refused: its record states a drift of nan, expected a number"),
    ],
)
def test_a_plan_that_has_not_passed_its_gate_is_refused(model_dir, repository, tmp_path, drift, message):
    with pytest.raises(PlanRefused, match=message):
        assemble_plans(model_dir, [plan(tmp_path, contract_of(model_dir), drift=drift)], repository)
    assert versions(repository / "arcface_trt") == []


def test_a_truncated_plan_is_refused(model_dir, repository, tmp_path):
    path = plan(tmp_path, contract_of(model_dir))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PlanRefused, match=r"is truncated: expected 300000 bytes, got 299999"):
        assemble_plans(model_dir, [path], repository)


def test_two_precisions_in_one_version_are_refused(model_dir, repository, tmp_path):
    contract = contract_of(model_dir)
    plans = [plan(tmp_path, contract, "8.6"), plan(tmp_path, contract, "8.9", precision="int8")]
    with pytest.raises(PlanRefused, match="one version serves one precision, got plans of fp16, int8"):
        assemble_plans(model_dir, plans, repository)


def test_a_folder_without_an_import_is_named(repository, tmp_path):
    with pytest.raises(Missing, match=r"no imported model in .*nothing: expected manifest\.json there"):
        assemble(tmp_path / "nothing", repository)


def test_versions_beyond_those_kept_are_removed_but_what_git_holds_stays(model_dir, repository, tmp_path):
    for seed in range(3):
        other = write_model(tmp_path / f"models-{seed}" / "tiny", seed=seed + 1)
        assemble(other, repository, keep=2)
    assert versions(repository / "arcface_reference") == [2, 3]
    assert [p.name for p in (repository / "arcface_reference" / "1").iterdir()] == ["model.py"]
