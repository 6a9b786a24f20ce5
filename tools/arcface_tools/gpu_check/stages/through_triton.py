"""Stage 5: the same plan behind tritonserver, with faces on the wire, in system and in CUDA shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any, Literal

import numpy as np

from arcface_build.plans.gpu import find_gpus
from arcface_clients import TritonEmbedder
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import Missing
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.check import to_gpu
from arcface_tools.gpu_check import artefacts
from arcface_tools.gpu_check.check import GpuCheck, Result
from arcface_tools.gpu_check.checkout import ROOT
from arcface_tools.gpu_check.served import Embed, repository_of, served
from arcface_tools.gpu_check.served import measure as measure_calls

TITLE = "Through tritonserver, against the plan alone"
GPU_TESTS = "tests/test_cuda_shared_memory.py"
WAYS: tuple[tuple[str, bool | Literal["system", "cuda"]], ...] = (
    ("gRPC", False),
    ("system shared memory", "system"),
    ("CUDA shared memory", "cuda"),
)


def measure(check: GpuCheck) -> None:
    """Run the steps."""
    network = check.settings.networks[0][0]
    check.step(f"{network} fp16", 45, partial(_served, check, network))
    check.step("the tests of CUDA shared memory that need a GPU", 20, partial(_gpu_tests, check))


def _served(check: GpuCheck, network: str, result: Result) -> None:
    """Every way, alone and with many requests in flight; a way that is refused is told with its reason."""
    built = artefacts.plan(check, network, "fp16")
    expected = artefacts.reference(check, built.source)
    bare = {row["batch"]: row["faces_per_s"] for row in check.result(2, f"{network} fp16").get("rows", [])}
    before = find_gpus()[0].memory_used_bytes
    with served(check, repository_of(check, built), ["arcface_trt"], f"tritonserver-{network}.log") as server:
        result["ways"] = {}
        for name, shared_memory in WAYS:
            try:
                result["ways"][name] = through(check, server.grpc_url, shared_memory, expected, bare)
            except Exception as exc:  # the other ways are still worth measuring
                result["ways"][name] = {"why": f"{type(exc).__name__}: {exc}"}
            check.write()
        result["vram_bytes"] = find_gpus()[0].memory_used_bytes - before
    refused = {name: way["why"] for name, way in result["ways"].items() if "why" in way}
    if refused:
        raise Missing("; ".join(f"{name}: {why}" for name, why in refused.items()))


def through(
    check: GpuCheck,
    url: str,
    shared_memory: bool | Literal["system", "cuda"],
    expected: np.ndarray,
    bare: dict[int, float],
    model: str = "arcface_trt",
) -> dict[str, Any]:
    """One way to the server: its drift, and rows with their share of the plan's own speed.

    With CUDA shared memory the faces lie on the host first, then on the GPU.

    Raises:
        Missing: the client did not take this way; the message is its reason.
    """
    with TritonEmbedder(url, model=model, shared_memory=shared_memory) as client:
        client.ensure_ready()
        if client.shared_memory.kind != (shared_memory or None):
            raise Missing(client.shared_memory.reason)
        faces: Any = to_gpu(check.faces) if shared_memory == "cuda" else check.faces
        found: dict[str, Any] = {"drift": compare_embeddings(expected, client.encode(faces)).to_json()}
        ways: dict[str, Embed] = {"rows": client.encode}
        if shared_memory == "cuda":
            there = {batch: to_gpu(np.resize(check.faces, (batch, *FACE_SHAPE))) for batch in check.settings.batches}
            ways["rows_of_gpu_faces"] = lambda part: client.encode(there[len(part)])
        for name, embed in ways.items():
            found[name] = []
            for batch in check.settings.batches:
                for callers in (1, check.settings.callers):
                    row = measure_calls(check, embed, batch, callers)
                    row["of_the_plan_alone"] = row["faces_per_s"] / bare[batch] if batch in bare else None
                    found[name].append(row)
    return found


def _gpu_tests(check: GpuCheck, result: Result) -> None:
    """They have waited for a GPU; pytest says which passed."""
    environment = {**os.environ, "REQUIRE_GPU": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    log = check.logs / "gpu-tests.log"
    with log.open("w") as said:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", GPU_TESTS],
            stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, check=False,
            timeout=max(min(check.left_s, 120), 1),
        )  # fmt: skip
    lines = log.read_text(errors="replace").strip().splitlines()
    result |= {"exit": done.returncode, "said": (lines or ["nothing"])[-1]}
    if done.returncode != 0:
        raise Missing(f"pytest ended with {done.returncode}: {result['said']}")
