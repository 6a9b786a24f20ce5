"""The contestants: a plan, ONNX Runtime on CUDA, PyTorch and a served plan, as callables from faces to embeddings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build import bench
from arcface_build.bench.torch_export import export_graph
from arcface_clients.contract import EMBEDDING_OUTPUT, FACE_INPUT
from arcface_clients.engines.devices import CPU, CUDA
from arcface_clients.engines.runtimes import open_session
from arcface_clients.errors import Missing
from arcface_tools.gpu_check.clocks import GpuLog

Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 (N,112,112,3) BGR on the host → float32 (N,D) on the host."""
Row = dict[str, Any]
WARM_UP_S = 0.5  # idle clocks are a fifth of busy ones


def measure(embed: Embed, faces: np.ndarray, batch: int, seconds: float, log: GpuLog, callers: int = 1) -> Row:
    """Median latency and faces/s at one batch size, including host copies, after half a second of warm-up.

    With several callers faces/s is their total in `seconds`. `gpu` has the GPU's clocks during that time.
    """
    part = np.resize(faces, (batch, *faces.shape[1:]))
    warm = time.perf_counter() + WARM_UP_S
    embed(part)
    while time.perf_counter() < warm:
        embed(part)

    def caller(_: int) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 10:
            start = time.perf_counter()
            embed(part)
            times.append(time.perf_counter() - start)
        return times

    since, started = time.monotonic(), time.perf_counter()
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
        "gpu": log.since(since),
    }


@contextmanager
def plan_in_process(plan: Path) -> Iterator[Embed]:
    """A plan in this process through Polygraphy's runner, from host to host, as a pipeline would call it."""
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    with TrtRunner(EngineFromBytes(plan.read_bytes())) as runner:
        yield lambda faces: runner.infer({FACE_INPUT: faces}, check_inputs=False)[EMBEDDING_OUTPUT].copy()


def onnxruntime_cuda(onnx: Path, tf32: bool) -> Embed:
    """The serving ONNX on ONNX Runtime's CUDA provider, with or without TF32.

    Raises:
        DependencyMissing: this ONNX Runtime has no such provider, or it did not start.
    """
    session = open_session(onnx, [(CUDA, {"use_tf32": "1" if tf32 else "0"}), CPU])
    return lambda faces: session.run([EMBEDDING_OUTPUT], {FACE_INPUT: faces})[0]


def find_torch_python(given: str | None) -> str:
    """A Python whose torch sees a GPU: the given one, else the first on PATH, in /usr/bin or in /opt/conda.

    Raises:
        Missing: there is none; the message has the error of each.
    """
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/bin", "/usr/local/bin", "/opt/conda/bin"]
    found = [sys.executable, *(str(Path(folder) / "python3") for folder in folders if folder)]
    said: dict[str, str] = {}
    for python in [given] if given else dict.fromkeys(found):
        if python in said or not (given or os.access(python, os.X_OK)):
            continue
        program = "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'its torch sees no GPU')"
        try:
            done = subprocess.run(
                [python, "-c", program],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env=_clean_environment(),
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            said[python] = str(exc)
            continue
        if done.returncode == 0:
            return python
        said[python] = (done.stderr.strip().splitlines() or ["no reason"])[-1]
    tried = "; ".join(f"{python}: {why}" for python, why in said.items())
    raise Missing(f"no Python here has torch with CUDA ({tried}). Name one: --torch-python")


def torch_baseline(
    python: str,
    onnx: Path,
    faces: np.ndarray,
    reference: np.ndarray,
    batches: Sequence[int],
    seconds: float,
    folder: Path,
    timeout_s: float,
    device: str = "cuda",
) -> dict[str, Any]:
    """PyTorch in another Python's process: its versions, `ways` as torch_baseline.py prints them, and why it stopped.

    Output from before a timeout or a crash is kept.

    Raises:
        Missing: nothing was measured, for instance because the baseline lacks an operator of the graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    export_graph(onnx, folder)
    np.save(folder / "faces.npy", faces)
    np.save(folder / "reference.npy", reference)
    script = Path(bench.__file__).with_name("torch_baseline.py")
    command = [python, str(script), str(folder), ",".join(map(str, batches)), str(seconds), device]
    stopped = ""
    with (folder / "said.jsonl").open("w") as out, (folder / "errors.txt").open("w") as errors:
        try:
            done = subprocess.run(
                command, stdout=out, stderr=errors, timeout=timeout_s, check=False, env=_clean_environment()
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            stopped = f"{type(exc).__name__} after {timeout_s:.0f} s"
        else:
            if done.returncode:
                lines = (folder / "errors.txt").read_text().strip().splitlines()
                stopped = (lines or ["no reason"])[-1]
    result: dict[str, Any] = {"ways": []}
    for line in (folder / "said.jsonl").read_text().splitlines():
        with suppress(ValueError):  # the last line may be incomplete
            said = json.loads(line)
            if "kind" in said:
                result["ways"].append(said)
            else:
                result |= said
    if not any("batches" in way for way in result["ways"]):
        errors_said = [way["error"] for way in result["ways"] if "error" in way]
        raise Missing(f"the PyTorch baseline did not run: {stopped or (errors_said or ['no reason'])[0]}")
    return result | ({"stopped": stopped} if stopped else {})


def _clean_environment() -> dict[str, str]:
    """An environment in which the other Python does not see this one's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")}


@contextmanager
def served_plan(plan: Path, sm: str, folder: Path, ready_timeout_s: float) -> Iterator[tuple[Embed, Any]]:
    """A plan behind its own tritonserver, called over gRPC: the callable, and the server.

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
        server.wait_ready(ready_timeout_s)
        with TritonEmbedder(server.grpc_url, model="arcface_trt") as client:
            yield client.encode, server
