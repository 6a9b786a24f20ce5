"""A plan behind its own tritonserver, and the measurement of any callable from faces to embeddings."""

from __future__ import annotations

import os
import shutil
import site
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess
from arcface_clients.atomic import copy_file
from arcface_clients.plans.manifest import manifest_path
from arcface_clients.plans.spec import sm_tag
from arcface_tools.gpu_check.artefacts import BuiltPlan
from arcface_tools.gpu_check.check import GpuCheck
from arcface_tools.gpu_check.checkout import REPOSITORY

Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 (N,112,112,3) BGR on the host → float32 (N,D) on the host."""
Row = dict[str, Any]
FEWEST_CALLS = 10


def measure(check: GpuCheck, embed: Embed, batch: int, callers: int = 1) -> Row:
    """Median latency and faces/s at one batch size, host copies included, with the GPU's clocks during that time.

    With several callers, faces/s is their total.
    """
    part = np.resize(check.faces, (batch, *check.faces.shape[1:]))
    warm = time.perf_counter() + check.settings.warm_up_s
    embed(part)
    while time.perf_counter() < warm:
        embed(part)

    def caller(_: int) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + check.settings.sample_s
        while time.perf_counter() < end or len(times) < FEWEST_CALLS:
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
        "gpu": check.log.between(since),
    }


@contextmanager
def served(check: GpuCheck, repository: Path, models: list[str], log: str) -> Iterator[TritonProcess]:
    """A tritonserver on a repository, ready.

    Raises:
        Missing, ServerFailed: no tritonserver here, or it does not load the models.
    """
    check.logs.mkdir(exist_ok=True)
    options: dict[str, Any] = {"log_path": check.logs / log, "ports": free_ports(), "config_name": ""}
    options["folder"] = Path.cwd()  # where a rehearsal has its stand-ins
    with (
        packages_shown_to_the_stub(),
        TritonProcess(find_tritonserver(), repository, models, **options) as server,
    ):
        server.wait_ready(max(min(90.0, check.left_s), 1.0))
        yield server


def repository_of(check: GpuCheck, built: BuiltPlan, config: Callable[[str], str] = lambda text: text) -> Path:
    """A model repository with a plan as arcface_trt; `config` may change its config.pbtxt."""
    repository = check.state / "served" / built.path.parent.name
    model, largest = repository / "arcface_trt", built.manifest.spec.max_batch
    shutil.rmtree(repository, ignore_errors=True)
    (model / "1").mkdir(parents=True)
    text = (REPOSITORY / "arcface_trt" / "config.pbtxt").read_text()
    for name in ("max_batch_size", "batch_size"):
        text = text.replace(f"{name}: 64", f"{name}: {largest}")
    (model / "config.pbtxt").write_text(config(text))
    for source in (built.path, manifest_path(built.path)):
        name = source.name.replace(built.path.name, f"{sm_tag(built.manifest.spec.sm)}.plan")
        copy_file(source, model / "1" / name)
    return repository


@contextmanager
def packages_shown_to_the_stub() -> Iterator[None]:
    """A temporary .pth file with the paths of PYTHONPATH, which the python backend's stub does not read.

    Only outside a virtual environment: a bundled interpreter has its packages beside it, a virtual one in it.
    """
    extra = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    pth = Path(site.getsitepackages()[0]) / "arcface-gpu-check.pth"
    if not extra or sys.prefix != sys.base_prefix or not os.access(pth.parent, os.W_OK):
        yield
        return
    pth.write_text("".join(f"{Path(path).resolve()}\n" for path in extra))
    try:
        yield
    finally:
        pth.unlink(missing_ok=True)
