"""`arcface doctor` and the figures of an engine: what is found on this host, and the fix for what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from arcface_build.serving.host_checks import check_store
from arcface_clients import benchmark_embedder, get_embedding_backend
from arcface_clients.checks.diagnostics import (
    check_driver_name,
    check_local_model,
    check_onnxruntime,
    check_restrictions,
    check_server,
    check_shared_memory,
    engine_diagnostics,
    gpus_here,
    guarded,
)
from arcface_clients.config.schema import EmbeddingConfig, LocalModel, Storage
from arcface_clients.engines import EngineRegistry
from arcface_clients.errors import ConfigError
from arcface_clients.gpu.cards import Gpu, parse_gpus, visible
from deadlines import HANG_S
from tiny_model import write_model

A10 = Gpu(0, "NVIDIA A10", "8.6", "550.54.15", 23028 << 20, 4 << 20, "12.4")


@pytest.fixture
def doctor(tmp_path):
    """doctor(*arguments, **environment) → (exit code, standard output) of the command in an empty folder."""

    def doctor(*arguments: str, **environment: str) -> tuple[int, str]:
        code = "import sys; from arcface_build.cli import main; main(sys.argv[1:])"
        given = {k: v for k, v in os.environ.items() if not k.startswith("ARCFACE_")}
        answer = subprocess.run(
            [sys.executable, "-c", code, "doctor", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**given, "ARCFACE_TRITON__URL": "127.0.0.1:1", **environment},
            timeout=HANG_S,
        )
        assert "Traceback" not in answer.stderr, answer.stderr
        return answer.returncode, answer.stdout

    return doctor


def test_host_without_a_server_has_one_problem_with_its_fix(doctor):
    code, out = doctor("--json")
    told = json.loads(out)
    assert code == 3 and not told["ok"] and told["engine"] is None
    assert [problem for problem in told["problems"] if problem["name"] == "server"] == [
        {
            "name": "server",
            "status": "problem",
            "found": "nothing answers at 127.0.0.1:1 (Connection refused)",
            "fix": "start one: arcface serve, or set triton.url (ARCFACE_TRITON__URL)",
        }
    ]
    assert [check["name"] for check in told["checks"]] == [
        "configuration",
        "python",
        "gpu",
        "tensorrt",
        "tensors on the GPU",
        "onnxruntime",
        "reference",
        "shared memory",
        "local model",
        "server",
        "restrictions",
        "drift",
        "queue",
        "answers",
        "photos",
        "encryption",
        "tritonserver",
        "weights",
        "processes",
        "plans",
        "store",
    ]


def test_local_backend_is_measured_and_has_no_problem(doctor, tmp_path):
    write_model(tmp_path / "models" / "tiny")
    code, out = doctor("--json", "--measure", "--faces", "8", "--batch-size", "4", ARCFACE_BACKEND="onnx")
    told = json.loads(out)
    assert (code, told["problems"]) == (0, []) or gpus_here()[0]
    engine = told["engine"]
    assert (engine["backend"], engine["precision"], engine["embedding_dim"]) == ("onnx", "fp32", 64)
    assert engine["engine_path"] == "models/tiny/serving.onnx"
    assert engine["validation"]["status"] == "passed" and engine["validation"]["faces"] == 16
    assert engine["throughput_faces_per_s"] > 0 and engine["latency_ms"]["p99"] >= engine["latency_ms"]["p50"] > 0


def test_answer_of_a_fallback_is_a_problem(doctor, tmp_path):
    write_model(tmp_path / "models" / "tiny")
    code, out = doctor("--measure", "--faces", "4", "--batch-size", "4", ARCFACE_BACKEND="tensorrt")
    assert code == 3
    assert "not tensorrt (tensorrt: DependencyMissing: " in out


def test_wrong_configuration_is_exit_code_2_and_the_rest_is_still_looked_at(doctor, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "embedding.yaml").write_text("backend: onx\nprecision: fp16\n")
    code, out = doctor()
    assert code == 2
    assert "PROBLEM  configuration  config/embedding.yaml: backend: got 'onx'" in out
    assert "ok       python" in out


def test_a_served_model_is_described(server):
    settings = EmbeddingConfig(triton={"url": server.grpc_url})
    check = check_server(settings)
    assert check.status == "ok"
    assert check.found.startswith(f"{server.grpc_url} serves arcface, width 512, contract ")


def test_a_model_that_is_not_served_is_named(server):
    check = check_server(EmbeddingConfig(triton={"url": server.grpc_url, "model": "arcface_v2"}))
    assert check.status == "problem" and "arcface_v2" in check.found


def test_unused_server_is_no_problem():
    assert check_server(EmbeddingConfig(backend="onnx", triton={"url": "127.0.0.1:1"})).status == "absent"


def test_a_driver_that_triton_does_not_find_by_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("arcface_clients.gpu.driver.DEVELOPMENT_NAME", str(tmp_path / "libcuda.so"))
    check = check_driver_name([A10])
    assert check.status == "absent" and "moves them through the host" in check.found and "libcuda.so.1" in check.fix
    monkeypatch.setattr("arcface_clients.gpu.driver.DEVELOPMENT_NAME", "libc.so.6")  # any library that opens
    assert check_driver_name([A10]).status == "ok"
    assert check_driver_name([]).found == "no GPU"


def test_gpu_that_this_onnx_runtime_cannot_use_is_a_problem():
    check = check_onnxruntime([A10])
    assert check.status == "problem" and "pip install onnxruntime-gpu" in check.fix
    assert check_onnxruntime([]).status == "ok"


def test_small_shared_memory_is_a_problem(tmp_path, monkeypatch):
    assert check_shared_memory(tmp_path / "none").status == "absent"
    monkeypatch.setattr("arcface_clients.checks.diagnostics.SHARED_MEMORY_WANTED_BYTES", 1 << 60)
    check = check_shared_memory(tmp_path)
    assert check.status == "problem" and "--shm-size=1g" in check.fix


def test_several_local_models_need_a_name(tmp_path):
    for name in ("a", "b"):
        write_model(tmp_path / name)
    check = check_local_model(EmbeddingConfig(backend="onnx", local=LocalModel(models_dir=tmp_path)))
    assert (check.status, check.fix) == ("problem", "name it: local.model in config/embedding.yaml")


def test_cache_that_may_not_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    check = check_store(EmbeddingConfig(storage=Storage(cache=tmp_path / "file" / "cache")))
    assert (check.status, check.fix) == ("problem", "set storage.cache to another folder")
    assert check_store(EmbeddingConfig(storage=Storage(cache=tmp_path / "new" / "cache"))).status == "ok"


def test_store_is_asked_and_what_it_says_is_told(s3_server, monkeypatch):
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    boto3.resource("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket="doctor")
    there = Storage(type="s3", bucket="doctor", endpoint=s3_server)
    assert check_store(EmbeddingConfig(storage=there)).found.startswith("s3://doctor/plans answers, 0 objects")
    check = check_store(EmbeddingConfig(storage=there.model_copy(update={"bucket": "nowhere"})))
    assert check.status == "problem"
    assert "there is no bucket 'nowhere'" in check.found and check.fix == "Create it: aws s3 mb s3://nowhere"
    gone = there.model_copy(update={"endpoint": "http://127.0.0.1:1"})
    assert check_store(EmbeddingConfig(storage=gone)).status == "problem"


def test_a_check_that_dies_is_a_problem_not_the_end():
    def look():
        raise OSError("broken")

    assert guarded("disk", look).found == "OSError: broken"


def test_gpus_are_read_from_nvidia_smi():
    csv = "0, NVIDIA A10, 8.6, 550.54.15, 23028, 4\n1, NVIDIA GB10, 12.1, 580.1, [N/A], [N/A]\n"
    a10, gb10 = parse_gpus(csv, "| Driver Version: 550.54.15   CUDA Version: 12.4  |")
    assert a10 == A10
    assert (gb10.sm, gb10.memory_bytes) == ("12.1", 0)
    assert visible([a10, gb10], "1,0") == [gb10, a10] and visible([a10, gb10], "") == []


@pytest.mark.parametrize(
    ("script", "status", "found"),
    [
        (None, "absent", "none: everything runs on the CPU"),
        ("echo 'Failed to initialize NVML'; exit 9", "problem", "nvidia-smi says 'Failed to initialize NVML'"),
        ("exit 0", "problem", "nvidia-smi lists none"),
        ("echo '0, NVIDIA A10, 8.6, 550.54.15, 23028, 4'", "ok", "NVIDIA A10 SM 8.6 22 GB driver 550.54.15"),
    ],
)
def test_driver_without_a_gpu_is_a_problem_and_no_driver_is_not(tmp_path, monkeypatch, script, status, found):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    check = gpus_here()[1]
    assert check.status == status and found in check.found


def test_benchmark_counts_and_times_what_it_is_told(tmp_path):
    calls = []
    engine = EngineRegistry.get("onnx", file=write_model(tmp_path / "tiny") / "serving.onnx", device="cpu", threads=1)
    plain = engine.encode
    engine.encode = lambda faces: calls.append(len(faces)) or plain(faces)
    report = benchmark_embedder(engine, num_faces=10, batch_size=4, warmup_batches=2)
    assert calls == [4, 4, 4, 4, 2]
    assert report.faces_per_s == pytest.approx(10 / report.seconds)
    assert 0 < report.latency_p50_ms <= report.latency_p99_ms <= report.latency_max_ms
    assert report.peak_rss_bytes > 20 << 20
    with pytest.raises(ConfigError, match="expected num_faces ≥ 1"):
        benchmark_embedder(engine, num_faces=0)


def test_diagnostics_of_an_engine_have_every_figure(tmp_path):
    write_model(tmp_path / "tiny")
    settings = EmbeddingConfig(backend="onnx", device="cpu", local=LocalModel(models_dir=tmp_path, threads=1))
    with get_embedding_backend(config=settings) as backend:
        told = engine_diagnostics(backend, settings, benchmark_embedder(backend, 4, 2, 0))
    assert json.loads(json.dumps(told)) == told
    assert set(told) == {
        "backend",
        "reason",
        "engine_path",
        "provider",
        "precision",
        "batch_size",
        "embedding_dim",
        "contract_id",
        "throughput_faces_per_s",
        "latency_ms",
        "vram_bytes",
        "peak_rss_bytes",
        "benchmark",
        "validation",
    }
    assert (told["provider"], told["batch_size"], told["vram_bytes"]) == ("CPUExecutionProvider", 64, None)


def test_doctor_of_a_url_embeds_a_face_and_expects_a_refusal_without_the_key(server, monkeypatch):
    monkeypatch.setenv("ARCFACE_BACKEND", "onnx")
    for url in (server.grpc_url, f"http://{server.http_url}"):
        process = subprocess.run(
            [sys.executable, "-m", "arcface_build", "doctor", url, "--json"], capture_output=True, text=True
        )
        told = {check["name"]: check for check in json.loads(process.stdout)["checks"]}
        assert told["server"]["status"] == "ok" and "serves arcface, width 512" in told["server"]["found"]
        assert told["restrictions"]["status"] == "ok", told["restrictions"]
        assert "refuses model control without its key" in told["restrictions"]["found"]


def test_doctor_names_a_server_that_lets_anyone_control_it(tmp_path, start_triton):
    from arcface_clients.config.sources import load_config
    from odd_models import write_model

    write_model(tmp_path / "repository", "good")
    open_to_all = start_triton(tmp_path / "repository", ["good"], config_name="", guarded=False)
    for url in (open_to_all.grpc_url, f"http://{open_to_all.http_url}"):
        check = check_restrictions(load_config(overrides={"triton": {"url": url}}))
        assert check.status == "problem" and "lets anyone who reaches it load and unload models" in check.found


def dripping(client: socket.socket) -> None:
    """One byte of a long answer at a time, for ever."""
    client.recv(4096)
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        client.sendall(b" ")
        time.sleep(0.1)


def a_page(client: socket.socket) -> None:
    """What a web server says to a path that it does not know."""
    client.recv(4096)
    page = b"<!DOCTYPE HTML>\n<html>\n  <title>Error</title>\n</html>\n"
    client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page))


STRANGERS = {
    "silent": (lambda client: client.recv(1), "no answer from "),
    "dripping": (dripping, "no answer from "),
    "a web server": (a_page, "answered HTTP 404: <!DOCTYPE HTML> <html> <title>Error</title> </html>"),
}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_no_triton_server_is_told_soon_and_in_words(stranger, protocol):
    behave, words = STRANGERS[stranger]

    def answer(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            while True:
                behave(client)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        url = f"{protocol}://127.0.0.1:{listener.getsockname()[1]}"
        config = EmbeddingConfig(backend="triton", triton={"url": url})
        started = time.monotonic()
        server, restrictions = check_server(config, 1.0), check_restrictions(config, 1.0)
        assert time.monotonic() - started < 10
    assert server.status == "problem" and "\n" not in server.found
    assert (words if protocol == "http" else "no ") in server.found
    assert restrictions.status == "absent" and restrictions.found.startswith("not asked: ")
