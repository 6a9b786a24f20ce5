"""Builds, proves and measures plans of some models within a time budget; writes docs/measured/<gpu>.json and .md.

The report is written after every step, so that an interrupted run keeps its measurements. A step that fails is recorded
with its reason, and the next one runs. Steps beyond the budget are listed. Nothing is estimated.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.plans.build import PlanProof, build_plan, tensorrt_version
from arcface_build.plans.gpu import find_gpus
from arcface_build.plans.source import find_source
from arcface_build.plans.typed import read_typed_onnx
from arcface_build.variants.make import load_named
from arcface_build.variants.search import layer_work
from arcface_clients import TritonEmbedder
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import ArcFaceError, Missing
from arcface_clients.evidence.drift import DRIFT_LIMITS, compare_embeddings
from arcface_clients.evidence.gate import judge_record
from arcface_clients.faces.check import to_gpu
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.plans.manifest import PlanManifest, now_utc, write_manifest
from arcface_clients.plans.spec import BuilderOptions, PlanSpec
from arcface_tools.gpu_check.check import FACES, FACES_SEED, GpuCheck, Stopped
from arcface_tools.gpu_check.clocks import GpuLog
from arcface_tools.gpu_check.contestants import (
    Row,
    find_torch_python,
    onnxruntime_cuda,
    plan_in_process,
    served_plan,
    torch_baseline,
)
from arcface_tools.gpu_check.plan_timer import PlanTimer

BATCHES = (1, 8, 32, 64, 128)
PRECISIONS = ("fp16", "fp32", "int8")


def main(argv: list[str] | None = None) -> int:
    """Parse, check the host, run, write; 0 with a report, 3 on a host that cannot build plans, 143 after SIGTERM."""
    arguments = _parser().parse_args(argv)
    try:
        gpu, version = find_gpus()[0], tensorrt_version()
    except Missing as exc:
        print(f"Missing: {exc}", file=sys.stderr)
        return exc.exit_code
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower().removeprefix("nvidia ")).strip("-")
    target = arguments.out / f"{name}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    with (
        tempfile.TemporaryDirectory(prefix="arcface-gpu-check-") as scratch,
        _packages_shown_to_the_stub(),
        GpuLog() as log,
    ):
        check = GpuCheck(
            models_dir=arguments.models_dir,
            scratch=Path(scratch),
            target=target,
            deadline=time.monotonic() + arguments.budget_s,
            seconds=arguments.sample_s,
            batches=tuple(arguments.batches),
            torch_python=arguments.torch_python,
            external_tactics=not arguments.no_external_tactics,
            faces=synthetic_faces(FACES, seed=FACES_SEED),
            log=log,
        )
        check.report = {
            "created": now_utc(),
            "command": " ".join(["scripts/gpu-check", *(argv if argv is not None else sys.argv[1:])]),
            "host": {
                "gpu": gpu.name, "sm": gpu.sm, "driver": gpu.driver, "cuda": gpu.cuda, "memory_bytes": gpu.memory_bytes,
                "tensorrt": version, "python": sys.version.split()[0], "cpus": os.cpu_count(),
            },
            "faces": {"count": len(check.faces), "origin": "synthetic"},
            "models": {}, "steps": [], "not_measured": [],
        }  # fmt: skip
        check.write()
        try:
            _run(check, dict(_named(text) for text in arguments.models), gpu.sm, version)
        except Stopped:
            print(f"ended by SIGTERM; what was measured: {target}", file=sys.stderr)
            return 128 + signal.SIGTERM
        finally:
            check.write()
    print(f"written: {target} and {target.with_suffix('.md').name}")
    return 0


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: unwinding may take a moment
    raise Stopped


def _run(check: GpuCheck, models: dict[str, str], sm: str, version: str) -> None:
    """All steps, most informative first: the first model's fp16 plan with baselines, other models, other precisions."""
    for precision in PRECISIONS:
        for model, source in models.items():
            if precision == "fp16":
                check.report["models"][model] = {"plans": {}}
                check.step(f"import {model}", 20, partial(_import, check, model, source))
            if precision != "fp32":
                check.step(f"{precision} variant of {model}", 30, partial(_quantize, check, model, precision))
            needs = 60 if precision == "fp16" else 45
            check.step(f"{precision} plan of {model}", needs, partial(_plan, check, model, precision, sm, version))
            if precision == "fp16":
                check.step(f"PyTorch on {model}", 25, partial(_torch, check, model))
                check.step(f"ONNX Runtime CUDA on {model}", 15, partial(_onnxruntime, check, model))


def _arcface(check: GpuCheck, *arguments: str) -> None:
    """Run one of our commands in a separate process, bounded by the budget."""
    command = [sys.executable, "-c", "from arcface_build.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=max(check.left_s, 1), check=False, env=environment
    )
    if done.returncode != 0:
        raise Missing((done.stderr.strip().splitlines() or ["it said nothing"])[-1])


def _import(check: GpuCheck, model: str, source: str) -> None:
    if not (check.models_dir / model / "manifest.json").is_file():
        _arcface(check, "import", source, "--name", model, "--models-dir", str(check.models_dir), "--no-assemble")


def _quantize(check: GpuCheck, model: str, precision: str) -> None:
    """A variant for TensorRT; int8 without the search, because this measures speed; its drift is reported."""
    variant = check.models_dir / model / "variants" / f"{precision}-tensorrt.onnx"
    if variant.is_file():
        return
    loose = ["--no-search", "--max-drift", "2"] if precision == "int8" else []
    arguments = ["--precision", precision, "--target", "tensorrt", "--eval-faces", "64", *loose]
    _arcface(check, "quantize", model, *arguments, "--models-dir", str(check.models_dir))


def _plan(check: GpuCheck, model: str, precision: str, sm: str, version: str) -> None:
    """Build, prove and measure in this process and through tritonserver; each result is reported at once."""
    source = find_source(model, precision, check.models_dir)
    typed = read_typed_onnx(source.onnx)
    options = BuilderOptions(external_tactics=check.external_tactics)
    largest = max(check.batches)
    # Kernels are tuned for opt, and the goal is defined at 64.
    spec = PlanSpec(source.name, typed.sha256, precision, sm, version, 1, min(64, largest), largest, options)
    entry: dict[str, Any] = {}
    check.report["models"][model]["plans"][precision] = entry
    reference = check.reference(source)
    # The gate is judged below: a plan that drifts is still worth measuring, and the report says so.
    proof = PlanProof(check.faces, reference, dict.fromkeys(DRIFT_LIMITS, 2.0))
    plan = check.scratch / model / precision / spec.file_name
    try:
        manifest = build_plan(
            typed, spec, plan, proof, contract_id=source.contract_id, timing_caches=check.scratch / "timing",
            timeout_s=max(check.left_s, 1),
        )  # fmt: skip
    except ArcFaceError as exc:
        entry["refused"] = str(exc)
        raise
    write_manifest(plan, manifest)
    entry |= _facts(manifest)
    check.step(
        f"{precision} plan of {model} on the GPU alone",
        10,
        lambda: _on_the_gpu(check, entry, plan, reference, gflop_per_face(source.reference)),
    )
    with plan_in_process(plan) as embed:
        entry["in_process"] = [check.row(embed, batch) for batch in check.batches]
    check.step(
        f"{precision} plan of {model} through tritonserver", 30, lambda: _served(check, entry, plan, sm, reference)
    )


def _on_the_gpu(check: GpuCheck, entry: dict[str, Any], plan: Path, reference: np.ndarray, gflop: float) -> None:
    """Replays with faces and embeddings on the GPU; their embeddings are compared with the reference too."""
    entry["gflop_per_face"] = gflop
    rows: list[Row] = []
    entry["on_gpu"] = rows
    with PlanTimer(plan.read_bytes()) as timer:
        for batch in check.batches:
            since = time.monotonic()
            row, embeddings = timer.time(check.faces, batch, check.seconds)
            expected = reference[np.arange(batch) % len(reference)]
            row["max_drift"] = compare_embeddings(expected, embeddings).max_drift
            row["tflops"] = row["faces_per_s"] * gflop / 1e3
            row["gpu"] = check.log.since(since)
            rows.append(row)


def _facts(manifest: PlanManifest) -> dict[str, Any]:
    drift, precision = dict(manifest.drift or {}), manifest.spec.precision
    limit = DRIFT_LIMITS[precision]
    return {
        "build_seconds": manifest.build["seconds"],
        "peak_vram_bytes": manifest.build["peak_vram_bytes"],
        "plan_bytes": manifest.size_bytes,
        "layers": manifest.precision_proof["compute"],
        "layers_onnx": manifest.precision_proof["onnx"],
        "drift": {**drift, "limit": limit},
        "passes_gate": judge_record(drift, precision, DRIFT_LIMITS).passed,
    }


def _served(check: GpuCheck, entry: dict[str, Any], plan: Path, sm: str, reference: np.ndarray) -> None:
    before = find_gpus()[0].memory_used_bytes
    with served_plan(plan, sm, plan.parent, min(90.0, check.left_s)) as (embed, server):
        cuda = f"CUDA shared memory, {plan.name}"
        parity = compare_embeddings(reference, embed(check.faces))
        rows = [check.row(embed, batch) for batch in check.batches]
        rows += [check.row(embed, batch, callers=4) for batch in check.batches[::2]]
        used = find_gpus()[0].memory_used_bytes - before
        entry["served"] = {"drift": parity.to_json(), "vram_bytes": used, "rows": rows, "pid": server.pid is not None}
        check.step(cuda, 15, lambda: _cuda_shared_memory(check, entry["served"], server.grpc_url, reference))


def _cuda_shared_memory(check: GpuCheck, served: dict[str, Any], url: str, reference: np.ndarray) -> None:
    """The same requests with faces on the host and with faces on the GPU, through regions on the GPU."""
    with TritonEmbedder(url, model="arcface_trt", shared_memory="cuda") as client:
        client.ensure_ready()
        if client.shared_memory.kind != "cuda":
            raise Missing(client.shared_memory.reason)
        served["cuda_drift"] = compare_embeddings(reference, client.encode(to_gpu(check.faces))).to_json()
        there = {batch: to_gpu(np.resize(check.faces, (batch, *FACE_SHAPE))) for batch in check.batches}
        ways = {"cuda_rows": client.encode, "gpu_faces_rows": lambda part: client.encode(there[len(part)])}
        for name, embed in ways.items():
            served[name] = [check.row(embed, batch) for batch in check.batches]


def _onnxruntime(check: GpuCheck, model: str) -> None:
    source = find_source(model, "fp32", check.models_dir)
    found: dict[str, list[Row]] = {}
    check.report["models"][model]["onnxruntime_cuda"] = found
    for name, tf32 in (("fp32", False), ("tf32", True)):
        embed = onnxruntime_cuda(source.onnx, tf32)
        found[name] = [check.row(embed, batch) for batch in check.batches]


def _torch(check: GpuCheck, model: str) -> None:
    source = find_source(model, "fp32", check.models_dir)
    check.report["models"][model]["pytorch"] = torch_baseline(
        find_torch_python(check.torch_python), source.onnx, check.faces, check.reference(source), check.batches,
        check.seconds, check.scratch / "torch", timeout_s=check.left_s / 2,
    )  # fmt: skip


def gflop_per_face(serving: Path) -> float:
    """Multiplications and additions of the convolutions for one face, in 10⁹; the rest is a thousandth of them."""
    return 2 * sum(layer_work(load_named(serving)).values()) / 1e9


def _named(text: str) -> tuple[str, str]:
    """("real", "files/x.onnx") from "real=files/x.onnx"; the name defaults to a file's stem or the source itself."""
    name, given, source = text.partition("=")
    return (name, source) if given else (Path(text).stem.lower() if text.endswith(".onnx") else text, text)


@contextmanager
def _packages_shown_to_the_stub() -> Iterator[None]:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description="Build, prove, serve and measure plans on this GPU; writes <gpu>.json and .md. Bounded in time.",
        epilog="Example: scripts/gpu-check --out docs/measured",
    )
    out = Path(os.environ.get("OUT") or "docs/measured")
    parser.add_argument("--out", type=Path, default=out, help="folder of the report [$OUT or docs/measured]")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["demo-r100", "demo-r50", "mobilefacenet"],
        metavar="[NAME=]SOURCE",
        help="sources as for arcface import, or names that are in --models-dir [demo-r100 demo-r50 mobilefacenet]",
    )
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--budget-s", type=float, default=480.0, help="the whole run ends after about this [480]")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="batch sizes [1 8 32 64 128]")
    parser.add_argument("--sample-s", type=float, default=0.7, help="seconds of one measurement [0.7]")
    parser.add_argument("--torch-python", help="a Python with torch and CUDA [the first found on PATH]")
    parser.add_argument("--no-external-tactics", action="store_true", help="where cuBLAS and cuDNN are only stubs")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
