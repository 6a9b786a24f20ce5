"""The in-process plan engine, as far as a host without a GPU can show it: which plan is taken, which is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from arcface_clients.checks.diagnostics import gpus_here
from arcface_clients.engines import EngineRegistry
from arcface_clients.errors import ConfigError, DependencyMissing, ModelMissing
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.find import PlanFile, find_plan, read_plan
from tiny_model import write_model


def put_in_cache(cache: Path, name: str, sm: str, precision: str, tensorrt: str = "10.3.0") -> Path:
    """A plan as the plan cache keeps it: KEY/SHA256/NAME.plan, KEY/manifest.json."""
    content = f"{name} {sm} {precision} {tensorrt}".encode()
    sha256 = hashlib.sha256(content).hexdigest()
    file = f"{name}-{precision}-sm{sm.replace('.', '')}.plan"
    key = hashlib.sha256(b"key" + content).hexdigest()
    plan = cache / key / sha256 / file
    plan.parent.mkdir(parents=True)
    plan.write_bytes(content)
    spec = {"model": name, "sm": sm, "precision": precision, "tensorrt": tensorrt}
    manifest = {"file": file, "sha256": sha256, "spec": spec, "contract_id": "c" * 64}
    (cache / key / "manifest.json").write_text(json.dumps(manifest))
    return plan


@pytest.fixture
def find(tmp_path):
    def find(sm: str, precision: str, **kwargs: str | None) -> PlanFile:
        return find_plan(sm, precision, model_repository=tmp_path / "repo", cache=tmp_path / "cache", **kwargs)

    return find


def test_plan_of_this_sm_and_precision_is_found_in_the_cache(tmp_path, find):
    for sm in ("8.0", "8.6"):
        for precision in ("fp32", "fp16"):
            put_in_cache(tmp_path / "cache", "r50", sm, precision)
    plan = find("8.6", "fp16")
    assert plan.path.name == "r50-fp16-sm86.plan"
    assert (plan.precision, plan.contract_id) == ("fp16", "c" * 64)


def test_plan_of_the_running_tensorrt_is_taken(tmp_path, find):
    for version in ("8.6.1", "10.3.0", "11.0.0"):
        put_in_cache(tmp_path / "cache", "r50", "8.6", "fp16", version)
    assert find("8.6", "fp16", tensorrt="10.3.0").manifest["spec"]["tensorrt"] == "10.3.0"
    with pytest.raises(ModelMissing):
        find("8.6", "fp16", tensorrt="10.9.0")


def test_assembled_plan_of_the_newest_version_goes_first(tmp_path, find):
    put_in_cache(tmp_path / "cache", "r50", "8.6", "fp16")
    for version in ("1", "2", "10"):
        folder = tmp_path / "repo" / "arcface_trt" / version
        folder.mkdir(parents=True)
        (folder / "sm86.plan").write_bytes(b"plan")
        (folder / "manifest.json").write_text(json.dumps({"contract_id": version, "precision": "fp16"}))
    plan = find("8.6", "fp16")
    assert (plan.path.parent.name, plan.contract_id, plan.precision) == ("10", "10", "fp16")


def test_missing_sm_lists_the_plans_that_exist(tmp_path, find):
    put_in_cache(tmp_path / "cache", "r50", "8.0", "fp16")
    put_in_cache(tmp_path / "cache", "r50", "9.0", "fp16")
    with pytest.raises(ModelMissing) as caught:
        find("8.9", "fp16")
    assert str(caught.value) == (
        f"no fp16 plan for SM 8.9 in {tmp_path}/repo/arcface_trt or {tmp_path}/cache "
        "(plans there: r50-fp16-sm80, r50-fp16-sm90). "
        "Build one here: arcface plan build --precision fp16, or fetch one: arcface plan pull"
    )


@pytest.mark.parametrize(
    ("sm", "tensorrt", "expected"),
    [
        ("8.6", "10.3.0", None),
        ("8.6", "10.3.0+cuda12", None),
        ("8.6", "8.6.1", "was built with TensorRT 10.3.0, this is 8.6.1"),
        ("8.9", "10.3.0", "was built for SM 8.6, this GPU is SM 8.9"),
    ],
)
def test_plan_that_cannot_load_here_is_refused_before_it_is_loaded(tmp_path, sm, tensorrt, expected):
    plan = read_plan(put_in_cache(tmp_path, "r50", "8.6", "fp16"))
    if expected is None:
        plan.check(sm, tensorrt)
    else:
        with pytest.raises(ModelMissing) as caught:
            plan.check(sm, tensorrt)
        assert expected in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"X" + data[1:]])
def test_damaged_plan_is_refused(tmp_path, damage):
    path = put_in_cache(tmp_path, "r50", "8.6", "fp16")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelMissing, match="is truncated or changed: expected sha256"):
        read_plan(path).check("8.6", "10.3.0")


def test_manifest_of_another_file_is_not_believed(tmp_path):
    plan = put_in_cache(tmp_path, "r50", "8.6", "fp16")
    other = plan.with_name("r100-fp16-sm86.plan")
    other.write_bytes(b"other")
    assert read_plan(other).manifest == {}


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
    from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath, Profile, engine_from_network, save_engine

    folder = write_model(tmp_path / "tiny")
    profile = Profile().add("face", *((n, 112, 112, 3) for n in (1, 4, 8)))
    network = NetworkFromOnnxPath(str(folder / "serving.onnx"))
    plan = tmp_path / "tiny-fp32.plan"
    save_engine(engine_from_network(network, CreateConfig(profiles=[profile])), str(plan))
    with (
        EngineRegistry.get("tensorrt", plan=plan, precision="fp32") as got,
        EngineRegistry.get("onnx", file=folder / "serving.onnx", device="cpu") as expected,
    ):
        for count in (1, 5, 8, 20, 1):
            faces = synthetic_faces(count)
            assert compare_embeddings(expected.encode(faces), got.encode(faces)).max_drift < 1e-5
        assert (got.max_batch, got.embedding_dim) == (8, 64)
