"""What passed its gate becomes a version of a served model; what did not, or is of another contract, is refused."""

from __future__ import annotations

import json

import pytest

from arcface_build.errors import ProofFailed
from arcface_build.repository.assemble import assemble, assemble_plans
from arcface_build.repository.versions import served_folder, served_manifest, versions
from arcface_build.serving.server_runtimes import ServerRuntimes
from arcface_build.serving.variant import check_installed, take_best_variant
from arcface_build.variants.choose import VariantChoice
from arcface_clients.errors import Missing, PlanRefused, WrongUse
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.plans.manifest import write_manifest
from arcface_clients.plans.read import read_plan
from arcface_clients.plans.signing import sign
from arcface_clients.plans.spec import BuilderOptions
from conftest import copy_repository
from plan_samples import spec, write_plan
from tiny_model import write_model

HERE = ServerRuntimes(("openvino-bf16", "openvino-fp32", "onnxruntime"))


@pytest.fixture
def model_dir(tmp_path):
    return write_model(tmp_path / "models" / "tiny")


@pytest.fixture
def repository(tmp_path):
    return copy_repository(tmp_path)


def contract_of(model_dir) -> str:
    return json.loads((model_dir / "manifest.json").read_text())["contract_id"]


def plan(folder, contract, sm="8.6", precision="fp16", drift=1e-4, seed=0, tuned_batches=(), **options):
    """A plan of random bytes with a manifest of this contract and drift."""
    of = spec(sm=sm, precision=precision, options=BuilderOptions(**options), tuned_batches=tuned_batches)
    path = folder / f"{seed}{of.options.hardware_compatible}" / of.file_name
    manifest = write_plan(path, of, seed=seed, contract_id=contract, drift=drift and {"max_drift": drift})
    write_manifest(path, manifest)
    return path


def judged(precision, drift, runtime="openvino-bf16", passed=True):
    """What a sidecar says of a variant."""
    gates = [
        {"runtime": runtime, "passed": passed, "limit": 0.01, "drift": {"max_drift": drift}, "judged_on": "others"}
    ]
    return {"format": 1, "precision": precision, "passed": passed, "gates": gates}


def overlay(repository, model) -> str:
    return (repository / model / "configs" / "onnx.pbtxt").read_text()


def test_an_imported_model_is_installed_with_its_reference(model_dir, repository):
    assert assemble(model_dir, repository) == {"arcface_reference": 1, "arcface_onnx": 1}
    assert (repository / "arcface_reference" / "1" / "source.onnx").is_file()
    assert contract_of(model_dir) in overlay(repository, "arcface_onnx")


def test_a_variant_brings_its_precision_and_its_accelerator(model_dir, repository):
    choice = VariantChoice("serving.onnx", "bf16", "openvino-bf16", "fastest", judged("bf16", 8e-4))
    assemble(model_dir, repository, choice)
    told = overlay(repository, "arcface_onnx")
    assert 'key: "precision" value: { string_value: "bf16" }' in told
    assert 'name: "openvino" parameters { key: "precision" value: "bf16" }' in told
    assert served_manifest(repository)["variant"]["runtime"] == "openvino-bf16"


def test_going_back_from_a_variant_takes_its_accelerator_away(model_dir, repository):
    from arcface_build.repository.install import roll_back

    assemble(model_dir, repository)
    assemble(model_dir, repository, VariantChoice("serving.onnx", "bf16", "openvino-bf16", "", judged("bf16", 8e-4)))
    assert roll_back(repository, "arcface_onnx") == (2, 1)
    assert "openvino" not in overlay(repository, "arcface_onnx")


def test_serve_does_not_bring_back_what_was_rolled_back(model_dir, repository):
    from arcface_build.repository.install import roll_back

    assemble(model_dir, repository)
    assemble(model_dir, repository, VariantChoice("serving.onnx", "bf16", "openvino-bf16", "", judged("bf16", 8e-4)))
    roll_back(repository, "arcface_onnx")
    before = served_manifest(repository)
    said = take_best_variant(repository, model_dir.parent, 3, DRIFT_LIMITS, lambda: HERE)
    name = before["name"]
    assert said == (
        "fp32 as installed: arcface rollback went back to it "
        f"(the fastest instead: arcface assemble {name} --variant auto)"
    )
    assert served_manifest(repository) == before
    assert assemble(model_dir, repository)["arcface_onnx"] == 1, "the same weights are no new version"


@pytest.mark.parametrize(
    ("runtime", "gated_in", "here", "why_not"),
    [
        ("openvino-bf16", ["openvino-bf16"], ("openvino-bf16", "openvino-fp32", "onnxruntime"), None),
        ("openvino-bf16", ["openvino-bf16"], ("openvino-fp32", "onnxruntime"), "it is set up for openvino-bf16, this"),
        ("openvino-fp32", ["openvino-bf16"], ("openvino-fp32", "onnxruntime"), "int8 passed its gate in openvino-bf16"),
        ("openvino-fp32", ["openvino-fp32"], ("onnxruntime",), "set up for openvino-fp32, this host has onnxruntime"),
        ("onnxruntime", [], ("onnxruntime",), "int8 passed its gate in no runtime, but this host has onnxruntime"),
        ("onnxruntime", ["onnxruntime"], ("onnxruntime",), None),
    ],
)
def test_what_another_host_installed_is_served_only_where_it_passed_its_gate(runtime, gated_in, here, why_not):
    gates = [gate for one in gated_in for gate in judged("int8", 0.005, one)["gates"]]
    sidecar = {"precision": "int8", "passed": True, "gates": gates}
    served = {"name": "tiny", "variant": {"precision": "int8", "runtime": runtime, "sidecar": sidecar}}
    if why_not is None:
        check_installed(served, lambda: ServerRuntimes(here), DRIFT_LIMITS)
    else:
        with pytest.raises(Missing, match=f"may not run on this host: .*{why_not}.* Next: arcface assemble tiny"):
            check_installed(served, lambda: ServerRuntimes(here), DRIFT_LIMITS)


@pytest.mark.parametrize(
    ("precision", "gated_in", "why_not"),
    [
        ("bf16", ["openvino-bf16"], "this server does not tell OpenVINO in which precision to compute"),
        ("int8", ["openvino-bf16"], "int8 passed its gate in openvino-bf16, but this host has onnxruntime"),
        ("int8", ["openvino-bf16", "openvino-fp32"], None),
    ],
)
def test_a_server_that_tells_openvino_no_precision_runs_only_what_passed_in_each(precision, gated_in, why_not):
    gates = [gate for one in gated_in for gate in judged(precision, 0.0005, one)["gates"]]
    sidecar = {"precision": precision, "passed": True, "gates": gates}
    variant = {"precision": precision, "runtime": "openvino-bf16", "sidecar": sidecar}
    native = ServerRuntimes(("openvino-bf16", "openvino-fp32", "onnxruntime"), told_precision=False)
    if why_not is None:
        check_installed({"name": "tiny", "variant": variant}, lambda: native, DRIFT_LIMITS)
    else:
        with pytest.raises(Missing, match=why_not):
            check_installed({"name": "tiny", "variant": variant}, lambda: native, DRIFT_LIMITS)


def test_fp32_is_served_on_every_host():
    check_installed({"name": "tiny"}, lambda: ServerRuntimes(("onnxruntime",)), DRIFT_LIMITS)


def test_a_variant_that_was_refused_is_not_installed(model_dir, repository):
    choice = VariantChoice("variants/int8-cpu.onnx", "int8", "openvino-bf16", "", judged("int8", 0.03, passed=False))
    with pytest.raises(
        ProofFailed,
        match=r"variants/int8-cpu\.onnx of tiny has not passed its gate: drift 0\.03, 3\.0 × the limit 0\.01",
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


def trt_config(repository):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(overlay(repository, "arcface_trt"), model_config_pb2.ModelConfig())


def test_the_profiles_of_a_plan_set_are_in_the_config_as_far_as_every_plan_has_them(
    model_dir, repository, tmp_path, caplog
):
    contract = contract_of(model_dir)
    plans = [plan(tmp_path, contract, sm, tuned_batches=(8, 1)) for sm in ("8.6", "9.0")]
    assemble_plans(model_dir, plans, repository, cuda_graphs=True)
    config = trt_config(repository)
    assert [(group.count, list(group.profile)) for group in config.instance_group] == [(2, ["0", "1", "2"])]
    assert config.optimization.cuda.graphs
    assert not caplog.records
    assemble_plans(model_dir, [plan(tmp_path, contract, "8.0", seed=1, tuned_batches=(8,))], repository)
    assert list(trt_config(repository).instance_group[0].profile) == ["0", "1"]
    assert not trt_config(repository).optimization.cuda.graphs
    assert "only the first 2 profiles of each plan are used: sm8.6, sm9.0 have more" in caplog.text
    assemble_plans(model_dir, [plan(tmp_path, contract, "8.0", seed=2)], repository)
    assert not trt_config(repository).instance_group[0].profile


def test_a_config_that_was_rewritten_is_not_guessed_at(model_dir, repository, tmp_path):
    config = repository / "arcface_trt" / "config.pbtxt"
    config.write_text(config.read_text().replace("instance_group [ {", "instance_group { #"))
    with pytest.raises(WrongUse, match="no single `instance_group"):
        assemble_plans(model_dir, [plan(tmp_path, contract_of(model_dir), "8.6", tuned_batches=(8,))], repository)
    assert versions(repository / "arcface_trt") == []


def built_for(repository) -> dict[str, str]:
    """File name in arcface_trt → SM that this plan was built for; each is what its manifest says."""
    folder = served_folder(repository, "arcface_trt")
    return {path.name: read_plan(path).manifest.spec.sm for path in sorted(folder.glob("*.plan"))}


def test_a_hardware_compatible_plan_stands_in_for_every_mapped_sm_from_8_0_on(model_dir, repository, tmp_path):
    contract = contract_of(model_dir)
    anywhere, own = plan(tmp_path, contract, hardware_compatible=True), plan(tmp_path, contract, "9.0", seed=1)
    assemble_plans(model_dir, [anywhere, own], repository)
    assert built_for(repository) == {
        "sm100.plan": "8.6", "sm120.plan": "8.6", "sm80.plan": "8.6", "sm86.plan": "8.6", "sm89.plan": "8.6",
        "sm90.plan": "9.0",
    }  # fmt: skip
    assemble_plans(model_dir, [plan(tmp_path, contract, "8.9", seed=2)], repository)
    assert built_for(repository)["sm89.plan"] == "8.9"
    assert built_for(repository)["sm80.plan"] == "8.6"


def test_the_same_plans_again_are_no_new_version_and_a_new_signature_is_one(model_dir, repository, tmp_path, keys):
    path = plan(tmp_path, contract_of(model_dir))
    assert assemble_plans(model_dir, [path], repository) == assemble_plans(model_dir, [path], repository) == 1
    write_manifest(path, sign(read_plan(path).manifest, keys["ours"] / "private.pem"))
    assert assemble_plans(model_dir, [path], repository) == 2
    assert read_plan(served_folder(repository, "arcface_trt") / "sm86.plan", keys["ours"] / "public.pem")


def test_a_plan_that_was_changed_in_the_repository_is_not_carried_into_the_next_version(
    model_dir, repository, tmp_path, caplog
):
    contract = contract_of(model_dir)
    assemble_plans(model_dir, [plan(tmp_path, contract, "8.6")], repository)
    served = served_folder(repository, "arcface_trt") / "sm86.plan"
    served.write_bytes(served.read_bytes()[:-1])
    assemble_plans(model_dir, [plan(tmp_path, contract, "9.0")], repository)
    assert built_for(repository) == {"sm90.plan": "9.0"}
    assert "not kept in the new version of arcface_trt: plan" in caplog.text


def test_a_plan_of_another_contract_is_refused(model_dir, repository, tmp_path):
    with pytest.raises(PlanRefused, match=r"tiny-fp16-sm86\.plan has contract ffffffffffff…, expected that of tiny"):
        assemble_plans(model_dir, [plan(tmp_path, "f" * 64)], repository)


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        (None, r"tiny-fp16-sm86\.plan is refused: its drift was never measured\. Build it again"),
        (0.002, r"tiny-fp16-sm86\.plan is refused: drift 0\.002, 2\.0 × the limit 0\.001 for fp16"),
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
