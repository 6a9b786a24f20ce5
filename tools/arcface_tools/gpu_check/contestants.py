"""What is measured: a plan, ONNX Runtime on CUDA, PyTorch, a served plan; each a callable from faces to embeddings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build import bench
from arcface_build.bench.torch_export import export_graph
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.errors import Missing

Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 (N,112,112,3) BGR on the host → float32 (N,D) on the host."""


def measure(embed: Embed, faces: np.ndarray, batch: int, seconds: float, callers: int = 1) -> dict[str, Any]:
    """Median latency and faces/s at one batch size, after five calls that do not count; host copies are included.

    With several callers faces/s is what all of them got in `seconds`.
    """
    part = np.resize(faces, (batch, *faces.shape[1:]))
    for _ in range(5):
        embed(part)

    def caller(_: int) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 10:
            start = time.perf_counter()
            embed(part)
            times.append(time.perf_counter() - start)
        return times

    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        times = sorted(t for own in pool.map(caller, range(callers)) for t in own)
    elapsed = time.perf_counter() - started
    median = times[len(times) // 2]
    return {
        "batch": batch,
        "callers": callers,
        "faces_per_s": batch * len(times) / elapsed if callers > 1 else batch / median,
        "median_ms": median * 1e3,
        "p99_ms": times[int(len(times) * 0.99)] * 1e3,
        "samples": len(times),
    }


@contextmanager
def plan_runner(plan: Path) -> Iterator[Embed]:
    """A plan in this process, through Polygraphy's runner."""
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    with TrtRunner(EngineFromBytes(plan.read_bytes())) as runner:
        yield lambda faces: runner.infer({FACE_INPUT: faces}, check_inputs=False)[EMBEDDING_OUTPUT].copy()


@contextmanager
def onnxruntime_cuda(onnx: Path) -> Iterator[Embed]:
    """The serving ONNX on ONNX Runtime's CUDA provider.

    Raises:
        Missing: this ONNX Runtime has none, or it fell back to the CPU.
    """
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        raise Missing(f"this ONNX Runtime has no CUDA provider (it has {', '.join(providers)})")
    session = onnxruntime.InferenceSession(str(onnx), providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise Missing("ONNX Runtime fell back to the CPU: its log says which library it did not find")
    yield lambda faces: session.run([EMBEDDING_OUTPUT], {FACE_INPUT: faces})[0]


def torch_baseline(
    python: str,
    onnx: Path,
    faces: np.ndarray,
    reference: np.ndarray,
    batches: Sequence[int],
    seconds: float,
    folder: Path,
) -> dict[str, Any]:
    """Eager PyTorch in another Python's process: what torch_baseline.py prints.

    Raises:
        Missing: that Python has no torch with CUDA, or the graph has an operator that the baseline does not know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    export_graph(onnx, folder)
    np.save(folder / "faces.npy", faces)
    np.save(folder / "reference.npy", reference)
    script = Path(bench.__file__).with_name("torch_baseline.py")
    command = [python, str(script), str(folder), ",".join(map(str, batches)), str(seconds)]
    # The other Python must not see the packages of this one.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Missing(f"the PyTorch baseline did not run: {exc}") from exc
    if done.returncode != 0:
        raise Missing(f"the PyTorch baseline did not run: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def served_plan(plan: Path, sm: str, folder: Path) -> Iterator[tuple[Embed, Any]]:
    """A plan behind a tritonserver of its own, asked over gRPC: the callable, and the server.

    Raises:
        Missing, ServerFailed: no tritonserver here, or it does not load the plan.
    """
    from arcface_build.repository.versions import find_repository
    from arcface_build.serving.binary import find_tritonserver
    from arcface_build.serving.process import TritonProcess, free_ports
    from arcface_clients import TritonEmbedder
    from arcface_clients.plans.manifest import manifest_path
    from arcface_clients.plans.spec import sm_tag

    repository = folder / "repository"
    model = repository / "arcface_trt"
    (model / "1").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_repository() / "arcface_trt" / "config.pbtxt", model / "config.pbtxt")
    for source in (plan, manifest_path(plan)):
        shutil.copyfile(source, model / "1" / source.name.replace(plan.name, f"{sm_tag(sm)}.plan"))
    log = folder / "tritonserver.log"
    with TritonProcess(find_tritonserver(), repository, ["arcface_trt"], log_path=log, ports=free_ports()) as server:
        server.wait_ready(90)
        with TritonEmbedder(server.grpc_url, model="arcface_trt") as client:
            yield client.encode, server
