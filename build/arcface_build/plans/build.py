"""Builds a plan in a child process, and writes it with its manifest only if it passes the proof.

A crash, running out of memory or Ctrl-C ends only the child. The plan gets its final name only after the engine
inspector has proved its precision and its drift from the reference embeddings is within the limit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from arcface_build.child_process import module_line
from arcface_build.errors import ProofFailed
from arcface_build.plans.build_child import EXIT_MISSING
from arcface_build.plans.gpu import Gpu, find_gpus
from arcface_build.plans.inspect import PrecisionProof, check_precision, count_precisions
from arcface_build.plans.typed import TypedOnnx, check_buildable
from arcface_clients.atomic import copy_file, write_json
from arcface_clients.errors import ArcFaceError, Missing, PlanRefused
from arcface_clients.evidence.drift import DRIFT_LIMITS
from arcface_clients.evidence.gate import GateVerdict, judge_embeddings
from arcface_clients.extras import install_command
from arcface_clients.plans.manifest import PlanManifest, file_sha256, now_utc
from arcface_clients.plans.spec import PlanSpec

OnPhase = Callable[[str, int, int], None]
"""Called with a phase's name, the steps done and the total number of steps (0: unknown)."""


@dataclass(frozen=True)
class PlanProof:
    """What a plan is measured on: faces uint8 (N,112,112,3) BGR and the reference's unit embeddings float32 (N,D)."""

    faces: np.ndarray
    reference: np.ndarray
    limits: Mapping[str, float] = field(default_factory=lambda: DRIFT_LIMITS)  # largest drift by precision


def tensorrt_version() -> str:
    """The version of the TensorRT that would build here.

    Raises:
        Missing: TensorRT is not installed, or its libraries cannot be loaded.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as exc:
        raise Missing(
            f"TensorRT is not installed here ({exc}). Use the server's image (docker compose run triton), or a plan "
            "built elsewhere: arcface plan pull"
        ) from exc
    return tensorrt.__version__


def build_plan(
    typed: TypedOnnx,
    spec: PlanSpec,
    target: Path,
    proof: PlanProof,
    *,
    contract_id: str | None = None,
    timing_caches: Path | None = None,
    refused: Path | None = None,
    logs: Path | None = None,
    timeout_s: float = 1800.0,
    on_phase: OnPhase | None = None,
) -> PlanManifest:
    """Build, prove and write the plan `target`; on any failure neither `target` nor a temporary file is left.

    timing_caches: folder of TensorRT's timing caches, one per TensorRT version and GPU; None: no cache.
    refused: folder that keeps failures: the log of the build and, if the plan failed its proof, the plan, the engine
        inspector's output and its report; None: not kept.
    logs: folder that gets the log and the inspector's output of every build that comes this far; None: not kept.

    Raises:
        WrongUse: the ONNX does not fit the spec.
        Missing: no GPU, no TensorRT, or out of memory.
        PlanRefused: TensorRT failed, or the plan is not of the requested precision.
        ProofFailed: the gate refuses its embeddings.
    """
    check_buildable(typed, spec.precision, spec.tensorrt)
    gpu = find_gpus()[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as name:
        folder = Path(name)
        cache = timing_cache_path(timing_caches, spec.tensorrt, gpu.name) if timing_caches else None
        if cache and cache.is_file():
            shutil.copyfile(cache, folder / "timing.cache")
        (folder / "request.json").write_text(json.dumps({"spec": spec.to_json(), "onnx": str(typed.path.resolve())}))
        np.save(folder / "faces.npy", proof.faces)
        try:
            with _VramWatch(gpu) as vram:
                _run_child(folder, timeout_s, on_phase or (lambda *_: None))
        except ArcFaceError as exc:
            if refused is None:
                raise
            copy_file(folder / "stderr.log", refused / f"{spec.file_name}.log")
            raise type(exc)(f"{exc} Full log: {refused / f'{spec.file_name}.log'}") from exc
        if logs is not None:
            copy_file(folder / "stderr.log", logs / f"{spec.file_name}.log")
            copy_file(folder / "inspector.json", logs / f"{spec.file_name}.inspector.json")
        manifest, counts, verdict = _measured(folder, typed, spec, gpu, vram.peak_bytes, proof, contract_id)
        try:
            check_precision(counts, spec.precision, typed.layers)
            if not verdict.passed:
                raise ProofFailed(
                    f"the {spec.precision} plan is refused: {verdict.why}. Keep more layers in a higher precision: "
                    "arcface quantize."
                )
        except ArcFaceError as exc:
            if refused is None:
                raise
            kept = refused / f"{spec.file_name}.refused"
            copy_file(folder / "plan", kept)
            copy_file(folder / "stderr.log", refused / f"{spec.file_name}.log")
            copy_file(folder / "inspector.json", refused / f"{spec.file_name}.inspector.json")
            write_json(refused / f"{spec.file_name}.json.refused", {"why": str(exc), **manifest.to_json()})
            raise type(exc)(f"{exc} It is kept, with its report: {kept}") from exc
        if cache and (folder / "timing.cache").is_file():
            copy_file(folder / "timing.cache", cache)
        (folder / "plan").chmod(0o644)
        (folder / "plan").replace(target)
    return manifest


def timing_cache_path(folder: Path, tensorrt: str, gpu_name: str) -> Path:
    """One timing cache per TensorRT version and kind of GPU; they must not be mixed."""
    return folder / f"trt-{tensorrt}-{re.sub(r'[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}.cache"


def _run_child(folder: Path, timeout_s: float, on_phase: OnPhase) -> None:
    """Run build_child to its end, forwarding its progress; kill it on Ctrl-C or timeout."""
    command = module_line("arcface_build.plans.build_child", str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order of nvidia-smi
    environment.setdefault("CUDA_MODULE_LOADING", "LAZY")  # keep unused kernels out of the GPU's memory
    with (folder / "stderr.log").open("w") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    late = threading.Event()

    def stop() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(timeout_s, stop)
    timer.start()
    error, said_lines = "", cast("IO[str]", child.stdout)  # it is a pipe
    try:
        for line in said_lines:
            told = json.loads(line)
            if "error" in told:
                error = told["error"]
            else:
                on_phase(told["phase"], told["step"], told["steps"])
        code = child.wait()
    finally:
        timer.cancel()
        child.kill()
        child.wait()
        said_lines.close()
    if code != 0:
        said = (folder / "stderr.log").read_text(errors="replace")
        raise child_error(code, error, said, timeout_s if late.is_set() else None)


def child_error(code: int, error: str, log: str, timeout_s: float | None = None) -> ArcFaceError:
    """The error for a failed child, from its exit code, its error message and the last errors of its log."""
    words = _last_errors(log) or error or "it said nothing"
    if timeout_s is not None:
        return PlanRefused(f"the build took longer than {timeout_s:g} s and was stopped. Give it more: --timeout-s")
    if code == EXIT_MISSING:
        return Missing(
            f"TensorRT cannot run here: {error}. Check the driver and the CUDA runtime: {install_command('tensorrt')}"
        )
    # Only the last errors: a successful build also logs kernels that it could not try for lack of memory.
    if re.search(r"out of memory|OutOfMemory|insufficient memory|CUDA Error: 2\b", words + error, re.IGNORECASE):
        return Missing(
            f"the GPU ran out of memory: {words}. Free some, or build with less: --workspace 512MB --max-batch 32"
        )
    if code == -signal.SIGKILL:
        return Missing(
            "the build was killed (by the kernel for lack of memory, or by hand). Free memory and try again."
        )
    if code < 0:
        return PlanRefused(f"TensorRT crashed ({signal.Signals(-code).name}): {words}. Nothing was written.")
    return PlanRefused(f"TensorRT built no plan: {words}. Nothing was written.")


def _last_errors(log: str) -> str:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.splitlines()]
    errors = [line for line in lines if re.match(r"\[[EC!]|\[!\]|\[W\].*CUDA|Error|.*Exception:", line)]
    return " | ".join(errors[-3:])[:600]


def _measured(
    folder: Path, typed: TypedOnnx, spec: PlanSpec, gpu: Gpu, peak: int | None, proof: PlanProof, contract: str | None
) -> tuple[PlanManifest, PrecisionProof, GateVerdict]:
    """The child's results: the manifest, the precision proof and the gate's verdict."""
    import polygraphy

    import arcface_clients

    result = json.loads((folder / "result.json").read_text())
    if result["tensorrt"] != spec.tensorrt:
        raise PlanRefused(f"built with TensorRT {result['tensorrt']}, expected {spec.tensorrt}.")
    counts = count_precisions((folder / "inspector.json").read_text())
    verdict = _worst(
        judge_embeddings(proof.reference, embeddings, spec.precision, proof.limits)
        for embeddings in np.load(folder / "embeddings.npy")  # one for each profile: each has kernels of its own
    )
    tools = {"arcface-triton": arcface_clients.__version__, "polygraphy": polygraphy.__version__}
    seconds = round(result["seconds"], 3)
    manifest = PlanManifest(
        spec=spec,
        sha256=file_sha256(folder / "plan"),
        size_bytes=(folder / "plan").stat().st_size,
        gpu={"name": gpu.name, "driver": gpu.driver, "cuda": gpu.cuda, "memory_bytes": gpu.memory_bytes},
        build={
            "seconds": seconds,
            "peak_vram_bytes": peak,
            "memory": result["memory"],
            "created": now_utc(),
            "tools": tools,
            "form": typed.form.to_json(),
        },
        precision_proof={**counts.to_json(), "onnx": dict(typed.layers)},
        drift={**verdict.report.to_json(), "limit": verdict.limit} if verdict.report else None,
        contract_id=contract,
        dim=typed.dim,
    )
    return manifest, counts, verdict


def _worst(verdicts: Iterable[GateVerdict]) -> GateVerdict:
    """The first that failed, else the one with the largest drift."""
    judged = list(verdicts)
    failed = [verdict for verdict in judged if not verdict.passed]
    return failed[0] if failed else max(judged, key=lambda v: v.report.max_drift if v.report else 0.0)


class _VramWatch:
    """Peak GPU memory above the level at the start, sampled through nvidia-smi.

    nvidia-smi counts the whole GPU (it does not see process ids across containers), so other work on it is included.
    """

    def __init__(self, gpu: Gpu, interval_s: float = 0.5) -> None:
        self.gpu, self.interval_s = gpu, interval_s
        self.peak_bytes: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _VramWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                used = next(g.memory_used_bytes for g in find_gpus() if g.index == self.gpu.index)
            except (Missing, StopIteration):
                return
            self.peak_bytes = max(self.peak_bytes or 0, used - self.gpu.memory_used_bytes, 0)
