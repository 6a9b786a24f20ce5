"""Renders the JSON of a run as Markdown; every figure comes from the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("fp32", "tf32", "fp16")  # of PyTorch; its own default lies between the first two
RATIOS = [f"× PyTorch {kind}" for kind in KINDS]


def to_markdown(report: Mapping[str, Any]) -> str:
    """Tables of plans and speed, and what was not measured, with the reason."""
    host = report["host"]
    lines = [
        f"# {host['gpu']}",
        "",
        f"SM {host['sm']}, driver {host['driver']}, CUDA {host['cuda']}, TensorRT {host['tensorrt']}, "
        f"{host['memory_bytes'] / 2**30:.0f} GiB. {report['created']}.",
        f"`{report['command']}`; {report['faces']['count']} {report['faces']['origin']} faces. "
        "Medians; the clocks of each measurement are in the JSON.",
        "",
    ]
    for model, entry in report["models"].items():
        lines += [f"## {model}", ""]
        plans = {p: plan for p, plan in entry["plans"].items() if "build_seconds" in plan}
        if plans:
            lines += _table(
                ["plan", "build s", "peak VRAM", "size", "layers", "max drift", "gate"],
                [_plan_row(precision, plan) for precision, plan in plans.items()],
            )
        rows = _speed_rows(entry)
        if rows:
            lines += ["From host to host:", ""]
            lines += _table(
                ["runtime", "batch", "callers", "faces/s", "median ms", *(f"× PyTorch {k}" for k in KINDS)], rows
            )
        if gpu_rows := _gpu_rows(entry):
            lines += ["On the GPU alone, faces and embeddings stay there:", ""]
            head = ["plan", "batch", "ms", "faces/s", "TFLOP/s", "of the GEMM peak", "SM MHz"]
            lines += _table([*head, *RATIOS], gpu_rows)
        if pytorch := entry.get("pytorch"):
            lines += [
                f"PyTorch {pytorch.get('torch')} of {pytorch.get('python')}; each ratio is to the best of its kind.",
                "",
            ]
            lines += [f"PyTorch {_way(way)} failed: {way['error']}" for way in pytorch["ways"] if "error" in way]
            lines += [f"PyTorch stopped: {pytorch['stopped']}"] if "stopped" in pytorch else []
        for precision, plan in entry["plans"].items():
            if "refused" in plan:
                lines += [f"{precision} was refused: {plan['refused']}", ""]
    if report["not_measured"]:
        lines += ["## Not measured", ""]
        lines += [f"- {gap['step']}: {gap['why']}" for gap in report["not_measured"]]
    return "\n".join(lines).rstrip() + "\n"


def _plan_row(precision: str, plan: Mapping[str, Any]) -> list[str]:
    peak, drift = plan["peak_vram_bytes"], plan["drift"]
    return [
        precision,
        f"{plan['build_seconds']:.1f}",
        f"{peak / 2**30:.2f} GiB" if peak else "not sampled",
        f"{plan['plan_bytes'] / 1e6:.1f} MB",
        ", ".join(f"{count} {name}" for name, count in plan["layers"].items()),
        f"{drift['max_drift']:.1e} of {drift['limit']:g}",
        "passed" if plan["passes_gate"] else "FAILED",
    ]


def _speed_rows(entry: Mapping[str, Any]) -> list[list[str]]:
    """One row per runtime and batch, with the ratio to the best PyTorch of each kind at the same batch."""
    ways = [way for way in entry.get("pytorch", {}).get("ways", []) if "batches" in way]
    groups: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for precision, plan in entry["plans"].items():
        groups.append((f"TensorRT {precision}", plan.get("in_process", [])))
        served = plan.get("served", {})
        groups.append((f"TensorRT {precision}, tritonserver gRPC", served.get("rows", [])))
        groups.append((f"TensorRT {precision}, tritonserver, CUDA shared memory", served.get("cuda_rows", [])))
        groups.append((f"TensorRT {precision}, tritonserver, faces on the GPU", served.get("gpu_faces_rows", [])))
    for kind, measured in entry.get("onnxruntime_cuda", {}).items():
        groups.append((f"ONNX Runtime CUDA {kind}", measured))
    groups += [(f"PyTorch {_way(way)}", way["batches"]) for way in ways]
    rows = []
    for name, measured in groups:
        for row in measured:
            ratios = [_ratio(row["median_ms"], best_ms(ways, kind, row["batch"], "median_ms")) for kind in KINDS]
            told = [f"{row['faces_per_s']:.0f}", f"{row['median_ms']:.2f}", *ratios]
            rows.append([name, str(row["batch"]), str(row.get("callers", 1)), *told])
    return rows


def _gpu_rows(entry: Mapping[str, Any]) -> list[list[str]]:
    """GPU time alone: plans by CUDA graph, PyTorch by its calls; both with all data on the GPU."""
    pytorch = entry.get("pytorch", {})
    ways = [way for way in pytorch.get("ways", []) if "batches" in way]
    peaks = pytorch.get("gemm_tflops", {})
    rows = []
    for precision, plan in entry["plans"].items():
        peak = peaks.get("tf32" if precision == "fp32" else "fp16")
        for row in plan.get("on_gpu", []):
            share = f"{row['tflops'] / peak:.0%} of {'TF32' if precision == 'fp32' else 'fp16'}" if peak else ""
            clock = row["gpu"].get("sm_clock_mhz")
            ratios = [_ratio(row["median_ms"], best_ms(ways, kind, row["batch"], "device_ms")) for kind in KINDS]
            name = f"TensorRT {precision}" + ("" if row["graph"] else ", no graph")
            told = [f"{row['median_ms']:.3f}", f"{row['faces_per_s']:.0f}", f"{row['tflops']:.1f}", share]
            rows.append([name, str(row["batch"]), *told, f"{clock:.0f}" if clock else "", *ratios])
    return rows


def best_ms(ways: Sequence[Mapping[str, Any]], kind: str, batch: int, key: str) -> float | None:
    """The shortest median of a kind of PyTorch at a batch size, over layouts, compiled or not."""
    times = [
        row[key]
        for way in ways
        if way["kind"] == kind
        for row in way["batches"]
        if row["batch"] == batch and key in row
    ]
    return min(times, default=None)


def _ratio(ms: float, base_ms: float | None) -> str:
    return f"{base_ms / ms:.2f}" if base_ms else ""


def _way(way: Mapping[str, Any]) -> str:
    return f"{way['kind']} {way['layout']}{' compiled' * way['compiled']}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(header) + " |"
    return [line, "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows), ""]
