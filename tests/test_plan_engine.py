"""The in-process plan engine, as far as a host without a GPU can show it: which plan is taken, which is refused."""

from __future__ import annotations

import json

import pytest

from arcface_build.plans.store import PlanStore
from arcface_build.repository.assemble import assemble_plans
from arcface_build.store import open_store
from arcface_clients.checks.diagnostics import gpus_here
from arcface_clients.engines import EngineRegistry
from arcface_clients.errors import ConfigError, DependencyMissing, Missing, ModelMissing
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.find import find_plan
from arcface_clients.plans.manifest import manifest_path
from arcface_clients.plans.read import Plan
from arcface_clients.plans.spec import BuilderOptions, PlanSpec
from conftest import copy_repository
from plan_samples import SPEC, in_cache, spec
from tiny_model import write_model


@pytest.fixture
def find(tmp_path):
    def find(sm: str, precision: str, **kwargs: str | None) -> Plan:
        return find_plan(sm, precision, model_repository=tmp_path / "repo", cache=tmp_path / "cache", **kwargs)

    return find


@pytest.fixture
def served(tmp_path):
    """served(spec …): these plans assembled into arcface_trt; the contract id of their model."""
    copy_repository(tmp_path).rename(tmp_path / "repo")
    model = write_model(tmp_path / "models" / "tiny")
    contract = json.loads((model / "manifest.json").read_text())["contract_id"]

    def served(*specs: PlanSpec) -> str:
        facts = {"contract_id": contract, "drift": {"max_drift": 0.0}}
        plans = [in_cache(tmp_path / "another host", of, **facts).path for of in specs]
        assemble_plans(model, plans, tmp_path / "repo")
        return contract

    return served


def test_plan_of_this_sm_and_precision_is_found_in_the_cache(tmp_path, find):
    for sm in ("8.0", "8.6"):
        for precision in ("fp32", "fp16"):
            in_cache(tmp_path / "cache" / "plans", spec(sm=sm, precision=precision), contract_id="c" * 64)
    manifest = find("8.6", "fp16").manifest
    assert manifest.spec == SPEC
    assert manifest.contract_id == "c" * 64


def test_plan_of_the_running_tensorrt_is_taken(tmp_path, find):
    for version in ("8.6.1", "10.3.0", "11.0.0"):
        in_cache(tmp_path / "cache", spec(tensorrt=version))
    assert find("8.6", "fp16", tensorrt="10.3.0").manifest.spec.tensorrt == "10.3.0"
    with pytest.raises(Missing):
        find("8.6", "fp16", tensorrt="10.9.0")


def test_a_pulled_plan_lies_in_the_cache_beside_its_manifest(tmp_path, find):
    plan = in_cache(tmp_path / "store")
    PlanStore(open_store(str(tmp_path / "store"))).pull(plan.manifest, tmp_path / "cache")
    assert find("8.6", "fp16").manifest == plan.manifest


def test_assembled_plan_of_the_newest_version_goes_first(tmp_path, find, served):
    in_cache(tmp_path / "cache")
    served(SPEC)
    contract = served(SPEC, spec(sm="9.0"))
    plan = find("8.6", "fp16")
    assert (plan.path.parent.name, plan.manifest.contract_id) == ("2", contract)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_plan_of_another_precision_is_never_taken_wherever_it_stands(tmp_path, find, served, precision):
    served(SPEC)
    with pytest.raises(Missing, match=f"no {precision} plan for SM 8.6 .*found: tiny-fp16-sm86"):
        find("8.6", precision)
    in_cache(tmp_path / "cache", spec(precision=precision))
    assert find("8.6", precision).manifest.spec.precision == precision
    assert find("8.6", "fp16").path.parent.parent.name == "arcface_trt"


def test_a_hardware_compatible_plan_is_taken_where_there_is_none_of_this_sm(tmp_path, find):
    in_cache(tmp_path / "cache", spec(options=BuilderOptions(hardware_compatible=True)))
    assert find("8.9", "fp16").manifest.spec.sm == "8.6"
    with pytest.raises(Missing):
        find("7.5", "fp16")
    in_cache(tmp_path / "cache", spec(sm="8.9", onnx_sha256="cd" * 32))
    assert find("8.9", "fp16").manifest.spec.sm == "8.9"


def test_a_plan_tuned_on_this_kind_of_card_goes_first_and_another_is_taken_with_a_warning(tmp_path, find, caplog):
    a10, a40 = ("NVIDIA A10", "2026-01-01T00:00:00+00:00"), ("NVIDIA A40", "2026-02-01T00:00:00+00:00")
    for card, created in (a10, a40):
        in_cache(tmp_path / "cache", spec(gpu=card), build={"created": created})
    assert find("8.6", "fp16").manifest.spec.gpu == "NVIDIA A40", "the newest, where the card is not asked"
    assert find("8.6", "fp16", gpu="NVIDIA A10").manifest.spec.gpu == "NVIDIA A10"
    assert not caplog.records
    assert find("8.6", "fp16", gpu="NVIDIA RTX A6000").manifest.spec.gpu == "NVIDIA A40"
    assert "was tuned on NVIDIA A40, this is NVIDIA RTX A6000" in caplog.text
    every = spec(tensorrt="10.9.0", options=BuilderOptions(same_compute_capability=True))
    in_cache(tmp_path / "cache", every)
    assert find("8.6", "fp16", gpu="NVIDIA RTX A6000").manifest.spec == every


def test_what_is_unfinished_or_refused_is_no_plan(tmp_path, find):
    plan = in_cache(tmp_path / "cache")
    for folder in (".refused", ".building"):
        (tmp_path / "cache" / folder).mkdir()
        plan.path.with_name(plan.path.name).rename(tmp_path / "cache" / folder / plan.path.name)
        plan = in_cache(tmp_path / "cache") if folder == ".refused" else plan
    with pytest.raises(Missing, match="found: none"):
        find("8.6", "fp16")


def test_of_several_the_one_that_was_signed_or_built_last_is_taken(tmp_path, find):
    old = in_cache(tmp_path / "cache", spec(onnx_sha256="01" * 32), build={"created": "2026-01-01T00:00:00+00:00"})
    new = in_cache(tmp_path / "cache", spec(onnx_sha256="02" * 32), build={"created": "2026-02-01T00:00:00+00:00"})
    old.path.touch()
    assert find("8.6", "fp16").manifest == new.manifest


def test_a_damaged_manifest_in_the_cache_costs_its_own_plan_only(tmp_path, find, caplog):
    good = in_cache(tmp_path / "cache")
    bad = in_cache(tmp_path / "cache", spec(sm="9.0"))
    manifest_path(bad.path).write_bytes(b"[" * 100_000)
    assert find("8.6", "fp16").manifest == good.manifest
    assert str(manifest_path(bad.path)) in caplog.text


def test_missing_sm_lists_the_plans_that_exist(tmp_path, find):
    for sm in ("8.0", "9.0"):
        in_cache(tmp_path / "cache", spec(sm=sm))
    with pytest.raises(Missing) as caught:
        find("8.9", "fp16")
    assert str(caught.value) == (
        f"no fp16 plan for SM 8.9 in {tmp_path}/repo/arcface_trt or {tmp_path}/cache "
        "(found: tiny-fp16-sm80, tiny-fp16-sm90). "
        "Build one here: arcface plan build --precision fp16, or fetch one: arcface plan pull"
    )


def test_named_plan_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ModelMissing, match="no plan at"):
        _ = EngineRegistry.get("tensorrt", plan=tmp_path / "none.plan").contract_id


@pytest.mark.skipif(bool(gpus_here()[0]), reason="this host has a GPU")
def test_host_without_tensorrt_or_gpu_says_what_is_missing():
    with pytest.raises(DependencyMissing, match=r"needs TensorRT and Polygraphy|no NVIDIA GPU on this host"):
        EngineRegistry.get("tensorrt").ensure_ready()


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "coreml"])
def test_device_that_a_plan_cannot_run_on_is_wrong_use(device):
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        EngineRegistry.get("tensorrt", device=device)


@pytest.mark.gpu
def test_plan_equals_onnx_runtime_on_a_gpu(tmp_path):
    """Builds an fp32 plan of a tiny model here, for batches up to 8."""
    from arcface_build.plans.build import PlanProof, build_plan, tensorrt_version
    from arcface_build.plans.get_or_build import get_or_build
    from arcface_build.plans.gpu import find_gpus
    from arcface_build.plans.typed import read_typed_onnx

    serving = write_model(tmp_path / "tiny") / "serving.onnx"
    typed, faces = read_typed_onnx(serving), synthetic_faces(20)
    options = BuilderOptions(external_tactics=False)
    wanted = PlanSpec("tiny", typed.sha256, "fp32", find_gpus()[0].sm, tensorrt_version(), 1, 4, 8, options)
    with EngineRegistry.get("onnx", file=serving, device="cpu") as expected:
        proof = PlanProof(faces, expected.encode(faces))
        cache = PlanStore(open_store(str(tmp_path / "cache")))
        get_or_build(wanted, cache, None, lambda of, target: build_plan(typed, of, target, proof))
        with EngineRegistry.get("tensorrt", cache=tmp_path / "cache", precision="fp32") as got:
            for count in (1, 5, 8, 20, 1):
                assert compare_embeddings(expected.encode(faces[:count]), got.encode(faces[:count])).max_drift < 1e-5
            assert (got.max_batch, got.embedding_dim) == (8, 64)
