"""Fixtures: test data that may be absent, faces, and one real tritonserver for the whole session."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcface_build.serving.binary import TritonBinary, find_tritonserver
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import LATENCY_QUANTILES, TritonProcess
from arcface_clients.errors import Missing

# Started by a script in the background, pytest inherits an ignored SIGINT and hands it on to the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real weights and faces; skips the test, visibly, where it is absent."""
    folder = Path(os.environ.get("ARCFACE_TEST_ASSETS", REPO.parent / "shared" / "assets"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no test assets in {folder} (set ARCFACE_TEST_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def lfw_faces(assets: Path) -> np.ndarray:
    """The 400 aligned LFW crops, in the order of faces/index.csv: uint8 (400,112,112,3) BGR."""
    import cv2

    rows = (assets / "faces" / "index.csv").read_text().splitlines()[1:]
    return np.stack([cv2.imread(str(assets / "faces" / "aligned112" / row.split(",")[0])) for row in rows])


@pytest.fixture(scope="session")
def lfw_embeddings(assets: Path, lfw_faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings float32 (400,128) by MobileFaceNet, as it gives them; names (400,)) of the LFW crops."""
    import onnxruntime

    from arcface_clients.contract import Preprocessing

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    model = assets / "models" / "MobileFaceNet.onnx"
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    imagenet = Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    rows = [session.run(None, {"input0": blob[None]})[0] for blob in imagenet.apply(lfw_faces)]
    names = [row.split(",")[1] for row in (assets / "faces" / "index.csv").read_text().splitlines()[1:]]
    return np.concatenate(rows), np.array(names)


@pytest.fixture(scope="session")
def triton_binary() -> TritonBinary:
    """The tritonserver of this host; skips the test, visibly, where there is none."""
    try:
        return find_tritonserver()
    except Missing as exc:
        pytest.skip(str(exc))


@pytest.fixture
def start_triton(triton_binary: TritonBinary, tmp_path: Path) -> Iterator[Callable[..., TritonProcess]]:
    """start_triton(repository, models, **options): a tritonserver of the test's own, ready, stopped at the end."""
    started: list[TritonProcess] = []

    def start(repository: Path | str, models: Sequence[str], **options: Any) -> TritonProcess:
        log_path = tmp_path / f"tritonserver-{len(started)}.log"
        options.setdefault("ports", free_ports())
        started.append(TritonProcess(triton_binary, repository, models, log_path=log_path, **options))
        started[-1].start().wait_ready()
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def demo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of model_repository/ without its weights, filled with the mobile demo network."""
    folder = tmp_path_factory.mktemp("served")
    import_into(copy_repository(folder), "demo")
    return folder / "model_repository"


@pytest.fixture(scope="session")
def server(
    triton_binary: TritonBinary, demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonProcess]:
    """The one tritonserver of the session: reference, ONNX Runtime and both ensembles on the mobile demo network."""
    log_path = tmp_path_factory.mktemp("log") / "tritonserver.log"
    models = ["arcface", "arcface_parity"]
    options = {"log_path": log_path, "ports": free_ports(), "extra": [LATENCY_QUANTILES]}
    with TritonProcess(triton_binary, demo_repository, models, **options) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="session")
def photo_server(
    triton_binary: TritonBinary, demo_repository: Path, assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonProcess]:
    """A tritonserver with the demo network and the models that take photos."""
    from arcface_build.repository.detector import install_detector, photo_models

    install_detector(next((assets / "detectors").glob("*yunet*.onnx")), demo_repository)
    models, _ = photo_models(demo_repository)
    options = {"log_path": tmp_path_factory.mktemp("photos") / "tritonserver.log", "ports": free_ports()}
    with TritonProcess(triton_binary, demo_repository, ["arcface", *models], **options) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="session")
def odd_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of `odd_server` lie."""
    return tmp_path_factory.mktemp("odd") / "repository"


@pytest.fixture(scope="session")
def odd_server(triton_binary: TritonBinary, odd_repository: Path) -> Iterator[TritonProcess]:
    """A second tritonserver, of quick models that misbehave each in its own way (tests/odd_models.py)."""
    from odd_models import write_models

    models = write_models(odd_repository)
    options = {"config_name": "", "log_path": odd_repository.parent / "tritonserver.log", "ports": free_ports()}
    with TritonProcess(triton_binary, odd_repository, models, **options) as process:
        process.wait_ready()
        yield process


@pytest.fixture
def slow_is_held(odd_repository: Path) -> Callable[[], AbstractContextManager[Callable[[], None]]]:
    """slow_is_held(): a block in which the model `slow` of `odd_server` answers no marked face (odd_models.held)."""
    from odd_models import held

    return partial(held, odd_repository)


def copy_repository(folder: Path) -> Path:
    """folder/model_repository: what git holds of ours, no weights."""
    from arcface_build.repository.hand_written import MEMORY, lay_out

    repository = lay_out(folder / "model_repository", REPO / "model_repository")
    (repository / MEMORY).unlink()  # as in a checkout
    return repository


def import_into(repository: Path, source: str) -> Path:
    """Import a source and install it; returns the models folder beside the repository."""
    from arcface_build.repository.bring_in import bring_in

    models = repository.parent / "models"
    bring_in(source, models, repository, versions_kept=3)
    return models


S3_SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.basicConfig(level=logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
S3_LOG: list[Path] = []


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server in a process of its own (moto's), empty; its URL. It ends with this session."""
    log = tmp_path_factory.mktemp("s3") / "server.log"
    line = [sys.executable, "-c", S3_SERVER]
    with (
        log.open("wb") as errors,
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        port = server.stdout.readline().strip()
        assert port, f"moto did not start: {log.read_text()}"
        S3_LOG[:] = [log]
        yield f"http://127.0.0.1:{port}"
        server.stdin.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What the S3 server said last, where a test that uses it fails."""
    report = (yield).get_result()
    if report.failed and S3_LOG and "s3_server" in getattr(item, "fixturenames", ()):
        report.sections.append(("S3 server", S3_LOG[0].read_text()[-4000:]))


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders, `ours` and `theirs`, each with an ed25519 pair private.pem and public.pem."""
    from plan_samples import make_keys

    return {name: make_keys(tmp_path_factory.mktemp(name)) for name in ("ours", "theirs")}


NVIDIA_SMI = """#!/bin/sh
case "$1" in
  --query*) echo "0, NVIDIA A10, 8.6, 550.54.15, 23028, 312" ;;
  *) echo "CUDA Version: 12.4" ;;
esac
"""


@pytest.fixture
def fake_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """fake_host(version, fault): child processes find our TensorRT and an nvidia-smi of an A10."""

    def prepare(version: str = "10.3.0", fault: str = "") -> None:
        folder = tmp_path / "host"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(REPO / "tests" / "fake_tensorrt.py", folder / "tensorrt.py")
        smi = folder / "nvidia-smi"
        smi.write_text(NVIDIA_SMI)
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_TRT_VERSION", version)
        monkeypatch.setenv("FAKE_TRT_FAULT", fault)
        monkeypatch.syspath_prepend(str(folder))

    return prepare


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` skip, visibly, where TensorRT or a GPU is missing; with REQUIRE_GPU=1 they fail instead.

    `gpu(tensorrt=False)`: a GPU is enough.
    """
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    from arcface_build.plans.build import tensorrt_version
    from arcface_build.plans.gpu import find_gpus

    try:
        find_gpus()
        if marker.kwargs.get("tensorrt", True):
            tensorrt_version()
    except Missing as exc:
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail(f"REQUIRE_GPU=1, and {exc}")
        pytest.skip(str(exc))
