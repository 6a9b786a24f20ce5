"""Engines in this process: names, files, providers, and equality with the reference on real ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from arcface_clients.contract import Preprocessing, contract_id
from arcface_clients.engines import EmbeddingEngine, EngineRegistry
from arcface_clients.engines.devices import canonical_device, order_of_providers
from arcface_clients.engines.model_folder import find_model
from arcface_clients.engines.runtimes import (
    cpu_flags,
    cpu_runtimes,
    gated_runtimes,
    has_bf16,
    has_openvino,
    runtime_for,
)
from arcface_clients.errors import BackendUnavailable, ConfigError, DependencyMissing, InvalidFaces, ModelMissing
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.synthetic import synthetic_faces
from deadlines import HANG_S
from tiny_model import write_manifest, write_model

IMAGENET = Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CUDA, COREML, TRT = "CUDAExecutionProvider", "CoreMLExecutionProvider", "TensorrtExecutionProvider"
VINO, CPU = "OpenVINOExecutionProvider", "CPUExecutionProvider"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_model(root / "tiny")
    write_model(root / "fixed", IMAGENET, dim=128, fixed_batch=True, seed=1)
    write_model(root / "bgr", Preprocessing("bgr", (0, 0, 0), (1, 1, 1)), seed=2)
    return root


@pytest.fixture(scope="module")
def faces():
    return synthetic_faces(9)


def engine(name, models, model="tiny", **kwargs):
    if name == "onnx":
        kwargs.setdefault("device", "cpu")
    return EngineRegistry.get(name, models_dir=models, model=model, threads=1, **kwargs)


def test_names_are_listed_and_the_old_one_is_an_alias():
    assert EngineRegistry.names()[:4] == ["triton", "tensorrt", "onnx", "insightface"]
    assert EngineRegistry.canonical("PyTorch") == "insightface"


def test_unknown_name_lists_the_known():
    with pytest.raises(ConfigError) as caught:
        EngineRegistry.get("tensorflow")
    assert str(caught.value) == (
        "unknown engine 'tensorflow': expected one of triton, tensorrt, onnx, insightface "
        "(pytorch is insightface). Did you mean tensorrt?"
    )


def test_own_engine_is_registered_and_names_cannot_be_taken():
    try:

        @EngineRegistry.register("mine")
        def mine(scale=1):
            return ("mine", scale)

        assert EngineRegistry.get("mine", scale=2) == ("mine", 2)
        with pytest.raises(ConfigError, match="'onnx' is taken"):
            EngineRegistry.register("onnx")(mine)
        with pytest.raises(ConfigError, match="'pytorch' is taken"):
            EngineRegistry.register("pytorch")(mine)
    finally:
        EngineRegistry._registered.pop("mine", None)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, arcface_clients, arcface_clients.engines, arcface_clients.engines.fallback\n"
        "heavy = 'onnx onnxruntime tensorrt polygraphy insightface boto3 tritonclient pydantic yaml cv2'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["onnx", "insightface"])
def test_engines_keep_the_protocol_and_the_contract(name, models, faces):
    with engine(name, models) as got:
        assert isinstance(got, EmbeddingEngine)
        got.ensure_ready()
        embeddings = got.encode(faces)
        assert (embeddings.shape, embeddings.dtype, got.embedding_dim) == ((9, 64), np.float32, 64)
        assert np.abs(np.linalg.norm(embeddings, axis=1) - 1).max() < 1e-5
        assert got.contract_id == json.loads((models / "tiny" / "manifest.json").read_text())["contract_id"]
        assert got.encode(faces[:0]).shape == (0, 64)
        assert got.encode(faces[0]).shape == (1, 64)
        assert np.allclose(got.encode(faces[::2].astype(np.float64)), embeddings[::2], atol=1e-6)
        with pytest.raises(InvalidFaces):
            got.encode(faces[:, :96])


@pytest.mark.parametrize("model", ["tiny", "fixed", "bgr"])
def test_onnx_equals_insightface_whatever_the_preprocessing(model, models, faces):
    with engine("onnx", models, model) as onnx, engine("pytorch", models, model) as reference:
        assert compare_embeddings(reference.encode(faces), onnx.encode(faces)).min_cosine > 0.999999
        assert reference.taken["call"] == ("get_feat" if model == "tiny" else "forward")


def test_stated_preprocessing_matters(models, faces):
    source = models / "fixed" / "source.onnx"
    right = EngineRegistry.get("insightface", file=source).encode(faces)
    wrong = EngineRegistry.get("insightface", file=source, preprocessing=Preprocessing("bgr")).encode(faces)
    assert compare_embeddings(right, wrong).min_cosine < 0.99


@pytest.mark.parametrize("max_batch", [1, 4, 9, 64])
def test_split_at_the_batch_limit_keeps_the_order(max_batch, models, faces):
    whole = engine("onnx", models).encode(faces)
    assert np.allclose(engine("onnx", models, max_batch=max_batch).encode(faces), whole, atol=1e-6)


def test_closed_engine_loads_again(models, faces):
    got = engine("onnx", models)
    first = got.encode(faces)
    got.close()
    got.close()
    assert np.array_equal(got.encode(faces), first)


def test_threads_share_an_engine(models, faces):
    got, answers = engine("onnx", models), []
    threads = [threading.Thread(target=lambda: answers.append(got.encode(faces))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert len(answers) == 4 and all(np.allclose(a, answers[0], atol=1e-6) for a in answers)


def test_what_was_taken_is_said(models):
    got = engine("onnx", models)
    got.ensure_ready()
    assert {k: got.taken[k] for k in ("provider", "reason", "file", "precision", "threads")} == {
        "provider": CPU,
        "reason": "device=cpu",
        "file": str(models / "tiny" / "serving.onnx"),
        "precision": "fp32",
        "threads": 1,
    }


@pytest.mark.skipif(VINO not in onnxruntime.get_available_providers(), reason="needs onnxruntime-openvino")
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 1e-3)])
def test_openvino_is_taken_in_the_precision_asked_for(precision, limit, models, faces):
    with engine("onnx", models, device="openvino", precision=precision) as got, engine("onnx", models) as plain:
        drift = compare_embeddings(plain.encode(faces), got.encode(faces)).max_drift
        assert drift < limit
        assert got.taken["provider"] == VINO
        if precision == "bf16" and has_bf16(cpu_flags()):
            assert got.taken["precision"] == "bf16" and drift > 1e-9
        if precision == "bf16" and not has_bf16(cpu_flags()):
            assert "this CPU has no bf16" in got.taken["reason"]


@pytest.mark.parametrize(
    ("device", "available", "needs", "expected"),
    [
        ("auto", [CPU], None, CPU),
        ("auto", [VINO, CPU], None, VINO),
        ("auto", [TRT, CUDA, CPU], None, CUDA),
        ("auto", [COREML, CPU], None, COREML),
        ("cpu", [TRT, CUDA, VINO, CPU], None, CPU),
        ("cuda:1", [TRT, CUDA, CPU], None, CUDA),
        ("tensorrt", [TRT, CUDA, CPU], None, TRT),
        ("auto", [VINO, CPU], VINO, VINO),
        ("cpu", [VINO, CPU], VINO, VINO),
        ("gpu", [VINO, CPU], None, None),
        ("cuda", [VINO, CPU], None, None),
        ("auto", [CUDA, CPU], VINO, None),
        ("cuda", [CUDA, VINO, CPU], VINO, None),
        ("coreml", [CPU], None, None),
    ],
)
def test_provider_follows_device_and_availability(device, available, needs, expected):
    if expected is None:
        with pytest.raises(DependencyMissing, match="this ONNX Runtime cannot run on device"):
            order_of_providers(device, available, needs)
    else:
        assert order_of_providers(device, available, needs)[0] == expected


class OnnxRuntimeWithBrokenCuda:
    """ONNX Runtime as onnxruntime-gpu is without cuDNN: the provider is listed, and its session is the CPU's."""

    def __init__(self) -> None:
        self.preloads = 0

    def __getattr__(self, name: str) -> object:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def preload_dlls(self) -> None:
        self.preloads += 1
        print("Failed to load libcudnn.so.9: cannot open shared object file")

    def InferenceSession(self, source, options, providers):
        return onnxruntime.InferenceSession(source, options, providers=[CPU])


@pytest.fixture
def broken_cuda(monkeypatch):
    runtime = OnnxRuntimeWithBrokenCuda()
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    return runtime


def test_auto_takes_the_next_provider_and_says_why(models, faces, broken_cuda, capsys, caplog):
    with engine("onnx", models, device="auto") as got:
        assert got.encode(faces).shape == (9, 64)
        assert got.taken["provider"] == CPU
    cause = "CUDAExecutionProvider and silently used CPUExecutionProvider"
    assert cause in got.taken["reason"] and cause in caplog.text
    assert "Failed to load libcudnn.so.9" in got.taken["reason"]
    assert broken_cuda.preloads == 1
    assert capsys.readouterr().out == "", "standard output may be JSON"


def test_cuda_that_was_asked_for_by_name_is_never_replaced(models, broken_cuda):
    with pytest.raises(DependencyMissing, match=r"CUDAExecutionProvider and silently used .*Failed to load libcudnn"):
        engine("onnx", models, device="cuda").ensure_ready()


@pytest.mark.parametrize(("text", "expected"), [("CUDA:1", "cuda:1"), ("mps", "coreml"), ("trt", "tensorrt")])
def test_devices_are_written_in_many_ways(text, expected):
    assert canonical_device(text) == expected


@pytest.mark.parametrize("text", ["cuda:x", "cpu:1", "", "rocm"])
def test_impossible_device_lists_the_possible(text):
    with pytest.raises(ConfigError, match="expected one of auto, gpu, cuda, tensorrt, coreml, openvino, cpu"):
        canonical_device(text)


def test_device_that_is_not_there_says_what_to_install(models):
    with pytest.raises(DependencyMissing) as caught:
        engine("onnx", models, device="coreml").ensure_ready()
    assert str(caught.value) == (
        "this ONNX Runtime cannot run on device 'coreml': expected one of CoreMLExecutionProvider, got "
        f"{', '.join(onnxruntime.get_available_providers())}. Install exactly one of its wheels: "
        "pip install onnxruntime (macOS)"
    )


def test_missing_model_lists_those_that_exist(models):
    with pytest.raises(ModelMissing) as caught:
        engine("onnx", models, "r50").ensure_ready()
    assert str(caught.value) == (
        f"no model 'r50' in {models} (found: bgr, fixed, tiny). Import it: arcface import SOURCE --name r50"
    )
    assert isinstance(caught.value, BackendUnavailable)


def test_several_models_and_no_name_is_wrong_use(models):
    with pytest.raises(ConfigError, match="contains 3 models"):
        find_model(models)


def test_demo_networks_beside_one_own_model_are_not_meant(tmp_path):
    for name in ("demo-mobile", "demo-r50"):
        write_model(tmp_path / name)
        write_manifest(tmp_path / name, "0", Preprocessing(), 64, source={"sha256": "0", "kind": "demo"})
    with pytest.raises(ConfigError, match="contains 2 models"):
        find_model(tmp_path)
    write_model(tmp_path / "mine")
    assert find_model(tmp_path).path.name == "mine"
    assert find_model(tmp_path, "demo-r50").path.name == "demo-r50"


@pytest.fixture
def two_of_ours_and_a_demo(tmp_path) -> Path:
    """models/ with mine, other and demo-mobile: three contracts, of sources with their names as digests."""
    for name in ("demo-mobile", "mine", "other"):
        folder, kind = tmp_path / "models" / name, "demo" if name == "demo-mobile" else "file"
        write_model(folder)
        write_manifest(folder, name, Preprocessing(), 64, source={"sha256": name, "kind": kind})
    return tmp_path / "models"


@pytest.mark.parametrize("name", ["demo-mobile", "mine", "other"])
def test_of_several_models_the_served_one_is_meant(two_of_ours_and_a_demo, name):
    contract = contract_id(name, Preprocessing(), 64)
    assert find_model(two_of_ours_and_a_demo, served=lambda: contract).path.name == name
    for engine in ("onnx", "insightface"):
        made = EngineRegistry.get(engine, models_dir=two_of_ours_and_a_demo, served=lambda: contract)
        assert made.contract_id == contract


def test_of_several_models_the_installed_one_is_meant_where_nothing_is_served(two_of_ours_and_a_demo, tmp_path):
    with pytest.raises(ConfigError, match=r"contains 2 models \(mine, other\), and none of them is served"):
        find_model(two_of_ours_and_a_demo)
    for version, name in ((9, "mine"), (10, "other")):
        folder = tmp_path / "model_repository" / "arcface_onnx" / str(version)
        folder.mkdir(parents=True)
        shutil.copyfile(two_of_ours_and_a_demo / name / "manifest.json", folder / "manifest.json")
    assert find_model(two_of_ours_and_a_demo, model_repository=tmp_path / "model_repository").path.name == "other"


def test_the_only_model_and_a_named_one_are_meant_without_asking_a_server(two_of_ours_and_a_demo):
    def served() -> str:
        raise AssertionError("asked")

    assert find_model(two_of_ours_and_a_demo, "mine", served).path.name == "mine"
    for name in ("demo-mobile", "other"):
        shutil.rmtree(two_of_ours_and_a_demo / name)
    assert find_model(two_of_ours_and_a_demo, served=served).path.name == "mine"


def test_an_engine_stays_with_the_model_that_it_found(two_of_ours_and_a_demo):
    mine = contract_id("mine", Preprocessing(), 64)
    answers = iter([mine])
    engine = EngineRegistry.get("onnx", models_dir=two_of_ours_and_a_demo, served=lambda: next(answers))
    assert [engine.contract_id, engine.contract_id] == [mine] * 2


def test_missing_variant_names_the_command(models):
    with pytest.raises(ModelMissing) as caught:
        engine("onnx", models, precision="int8").ensure_ready()
    assert str(caught.value) == (
        f"no int8 ONNX of model tiny: expected {models}/tiny/variants/int8-cpu.onnx, not found (variants found: none). "
        "Make it: arcface quantize tiny --precision int8"
    )


BF16, FP32, ORT = "openvino-bf16", "openvino-fp32", "onnxruntime"


@pytest.mark.parametrize(
    ("precision", "gated", "here", "runtime", "why_not"),
    [
        ("fp32", None, [ORT], ORT, ""),
        ("fp32", None, [BF16, FP32, ORT], FP32, ""),
        ("fp32", [], [BF16, FP32], FP32, ""),
        ("fp32", None, [BF16], None, "no runtime here computes fp32 in fp32"),
        ("fp16", [ORT], [BF16, FP32, ORT], FP32, ""),
        ("bf16", None, [BF16, FP32, ORT], BF16, ""),
        ("bf16", [BF16], [BF16, FP32, ORT], BF16, ""),
        ("bf16", [], [BF16, FP32], None, "bf16 passed its gate in no runtime, but this host has openvino-bf16"),
        ("bf16", [BF16], [FP32, ORT], None, "bf16 needs OpenVINO and a CPU with avx512_bf16 or amx_bf16"),
        ("bf16", [BF16], [ORT], None, "bf16 needs OpenVINO and a CPU with avx512_bf16 or amx_bf16"),
        ("int8", None, [BF16, FP32], FP32, ""),
        ("int8", None, [ORT], ORT, ""),
        ("int8", [BF16, FP32], [BF16, FP32, ORT], BF16, ""),
        ("int8", [FP32], [BF16, FP32, ORT], FP32, ""),
        ("int8", [ORT], [BF16, FP32, ORT], ORT, ""),
        ("int8", [ORT], [ORT], ORT, ""),
        (
            "int8",
            [BF16],
            [FP32, ORT],
            None,
            "int8 passed its gate in openvino-bf16, but this host has openvino-fp32 and",
        ),
        (
            "int8",
            [BF16, FP32],
            [ORT],
            None,
            "passed its gate in openvino-bf16, openvino-fp32, but this host has onnxruntime",
        ),
        (
            "int8",
            [],
            [BF16, FP32, ORT],
            None,
            "int8 passed its gate in no runtime, but this host has openvino-bf16 and",
        ),
    ],
)
def test_a_variant_is_run_only_as_it_was_gated(precision, gated, here, runtime, why_not):
    got, why = runtime_for(precision, gated, here)
    assert got == runtime
    assert why_not in why if why_not else why == ""


@pytest.mark.parametrize(
    ("flags", "openvino", "expected"),
    [
        ({"avx512_bf16"}, True, (BF16, FP32, ORT)),
        ({"amx_bf16"}, True, (BF16, FP32, ORT)),
        ({"avx2"}, True, (FP32, ORT)),
        ({"avx512_bf16"}, False, (ORT,)),
    ],
)
def test_a_cpu_has_the_runtimes_of_its_instructions(flags, openvino, expected):
    assert cpu_runtimes(frozenset(flags), openvino) == expected


PASSED = {"passed": True, "limit": 0.01, "drift": {"max_drift": 0.005, "faces": 9}, "judged_on": "others"}


def sidecar_of_int8(*gates: dict) -> dict:
    return {"precision": "int8", "passed": True, "gates": list(gates)}


@pytest.mark.parametrize(
    ("sidecar", "expected"),
    [
        (None, None),
        ({}, []),
        (sidecar_of_int8({**PASSED, "runtime": ORT, "passed": False}), []),
        (sidecar_of_int8({**PASSED, "runtime": ORT, "more": 1}, {**PASSED, "runtime": FP32, "passed": False}), [ORT]),
    ],
)
def test_gates_are_read_whatever_else_a_sidecar_holds(sidecar, expected):
    assert gated_runtimes(sidecar) == expected


def test_bf16_that_its_gate_refused_is_not_run(tmp_path):
    if not has_openvino() or not has_bf16(cpu_flags()):
        pytest.skip("needs OpenVINO on a CPU with bf16")
    folder = write_model(tmp_path / "tiny")
    (folder / "variants").mkdir()
    (folder / "variants" / "bf16-cpu.json.refused").touch()
    with pytest.raises(ModelMissing, match="the gate refused bf16 of model tiny"):
        engine("onnx", tmp_path, device="openvino", precision="bf16").ensure_ready()


def test_refused_variant_is_named_as_refused(tmp_path):
    folder = write_model(tmp_path / "tiny")
    (folder / "variants").mkdir()
    (folder / "variants" / "int8-cpu.onnx.refused").touch()
    with pytest.raises(ModelMissing, match="which its gate refused"):
        engine("onnx", tmp_path, precision="int8").ensure_ready()


def test_int8_variant_runs_as_its_sidecar_says(tmp_path, faces):
    folder = write_model(tmp_path / "tiny")
    (folder / "variants").mkdir()
    (folder / "serving.onnx").rename(folder / "variants" / "int8-cpu.onnx")
    (folder / "serving.onnx").touch()
    sidecar = folder / "variants" / "int8-cpu.json"
    gate = {"runtime": "onnxruntime", "passed": True, "limit": 0.01, "drift": {"max_drift": 0.009}, "judged_on": "all"}
    sidecar.write_text(json.dumps({"precision": "int8", "passed": True, "gates": [gate]}))
    with engine("onnx", tmp_path, precision="int8") as got:
        assert got.encode(faces).shape == (9, 64)
        assert (got.taken["runtime"], got.contract_id is not None) == ("onnxruntime", True)
    with pytest.raises(ModelMissing, match="passed its gate in no runtime, but this host has onnxruntime"):
        engine("onnx", tmp_path, precision="int8", max_drift={"int8": 0.008}).ensure_ready()
    sidecar.write_text(json.dumps({"precision": "int8", "passed": True, "gates": [{**gate, "passed": False}]}))
    with pytest.raises(ModelMissing, match="passed its gate in no runtime, but this host has onnxruntime"):
        engine("onnx", tmp_path, precision="int8").ensure_ready()


def test_source_file_given_to_the_onnx_engine_is_refused(models):
    with pytest.raises(ConfigError, match="not a serving ONNX: expected face uint8"):
        EngineRegistry.get("onnx", file=models / "tiny" / "source.onnx", device="cpu").ensure_ready()


def test_serving_file_given_to_the_reference_is_refused(models):
    with pytest.raises(ConfigError, match="expected a source ONNX with input"):
        EngineRegistry.get("insightface", file=models / "tiny" / "serving.onnx").ensure_ready()


def test_truncated_file_is_refused(models, tmp_path):
    data = (models / "tiny" / "serving.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="ONNX Runtime cannot load the graph"):
        EngineRegistry.get("onnx", file=tmp_path / "cut.onnx", device="cpu").ensure_ready()


def test_real_weights_are_run_by_the_reference_with_their_own_preprocessing(assets, lfw_faces):
    file = assets / "models" / "MobileFaceNet.onnx"
    with EngineRegistry.get("insightface", file=file, preprocessing=IMAGENET, threads=1) as reference:
        got = reference.encode(lfw_faces[:16])
        session = onnxruntime.InferenceSession(str(file), providers=[CPU])
        blob = IMAGENET.apply(lfw_faces[:16])
        expected = np.concatenate([session.run(None, {"input0": row[None]})[0] for row in blob])
        assert compare_embeddings(expected, got).min_cosine > 0.9999999
        assert got.shape == (16, 128)
