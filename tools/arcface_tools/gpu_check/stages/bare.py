"""Stage 2: the first network's fp16 plan alone on the GPU, and which of its layers take the time."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from arcface_clients.atomic import write_json
from arcface_clients.evidence.drift import DRIFT_LIMITS, compare_embeddings
from arcface_clients.evidence.gate import judge_record
from arcface_tools.gpu_check import artefacts
from arcface_tools.gpu_check.artefacts import BuiltPlan, Shape
from arcface_tools.gpu_check.check import GpuCheck, Result
from arcface_tools.gpu_check.plan_timer import PlanTimer
from arcface_tools.gpu_check.stages.peaks import gemm_tflops

TITLE = "The plan alone on the GPU: faces and embeddings stay there, CUDA graphs, CUDA events"
LAYERS_SHOWN = 25


def measure(check: GpuCheck) -> None:
    """Run the steps."""
    network = check.settings.networks[0][0]
    check.step(f"{network} fp16", 90, partial(time_plan, check, network, "fp16"))
    for batch in check.settings.goal_batches:
        check.step(f"{network} fp16, layers at batch {batch}", 10, partial(_layers, check, network, batch))


def time_plan(
    check: GpuCheck, network: str, precision: str, result: Result, shape: Shape | None = None, graph: bool = True
) -> None:
    """What a plan is, and a row for each batch it takes."""
    built = artefacts.plan(check, network, precision, shape)
    result["plan"] = facts(built)
    time_built(check, built, result, graph)


def time_built(check: GpuCheck, built: BuiltPlan, result: Result, graph: bool = True) -> None:
    """A row for each batch: times, TFLOP/s, share of the peak, clocks, and the drift of the timed runs themselves."""
    spec, expected = built.manifest.spec, artefacts.reference(check, built.source)
    peak, gflop = gemm_tflops(check, spec.precision), built.gflop_per_face
    result |= {"gflop_per_face": gflop, "gemm_tflops": peak, "rows": []}
    with PlanTimer(built.path.read_bytes(), check.settings.replays, check.settings.warm_up_s) as timer:
        for batch in check.settings.batches:
            if not spec.min_batch <= batch <= spec.max_batch:
                continue
            since = time.monotonic()
            row, embeddings = timer.time(check.faces, batch, check.settings.sample_s, graph)
            row["tflops"] = row["faces_per_s"] * gflop / 1e3
            row["share_of_peak"] = row["tflops"] / peak if peak else None
            row["max_drift"] = compare_embeddings(expected[np.arange(batch) % len(expected)], embeddings).max_drift
            row["gpu"] = check.log.between(since)
            result["rows"].append(row)
            check.write()


def facts(built: BuiltPlan) -> dict[str, Any]:
    """What the build said of a plan, and whether its proof passes the gate."""
    manifest = built.manifest
    drift, precision = dict(manifest.drift or {}), manifest.spec.precision
    return {
        "build_seconds": manifest.build["seconds"],
        "peak_vram_bytes": manifest.build["peak_vram_bytes"],
        "memory": manifest.build.get("memory"),
        "plan_bytes": manifest.size_bytes,
        "layers": manifest.precision_proof["compute"],
        "layers_onnx": manifest.precision_proof["onnx"],
        "max_drift": drift.get("max_drift"),
        "limit": DRIFT_LIMITS[precision],
        "refused": built.refused,
        "passes_gate": built.refused is None and judge_record(drift, precision, DRIFT_LIMITS).passed,
        "batches": [manifest.spec.min_batch, manifest.spec.opt_batch, manifest.spec.max_batch],
    }


def _layers(check: GpuCheck, network: str, batch: int, result: Result) -> None:
    """The slowest layers with their kernels; all of them in logs/."""
    built = artefacts.plan(check, network, "fp16")
    with PlanTimer(built.path.read_bytes(), check.settings.replays, check.settings.warm_up_s) as timer:
        times = timer.layers(check.faces, batch)
    kernels = {str(layer.get("Name")): layer for layer in artefacts.inspected(check, built)}
    total = sum(ms for _, ms in times)
    rows = [
        {
            "layer": name,
            "kind": kernels.get(name, {}).get("LayerType"),
            "kernel": kernels.get(name, {}).get("TacticName"),
            "ms": ms,
            "share": ms / total if total else None,
        }
        for name, ms in times
    ]
    write_json(check.logs / f"layers-{network}-fp16-{batch}.json", rows)
    by_kind: dict[str, float] = {}
    for row in rows:
        by_kind[str(row["kind"])] = by_kind.get(str(row["kind"]), 0.0) + float(row["ms"])  # type: ignore[arg-type]
    slowest = sorted(rows, key=lambda row: -float(row["ms"]))[:LAYERS_SHOWN]  # type: ignore[arg-type]
    result |= {"batch": batch, "total_ms": total, "layers": len(rows), "ms_by_kind": by_kind, "slowest": slowest}
