"""The report for readers: the JSON of a run in, Markdown out. Every figure comes from the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def to_markdown(report: Mapping[str, Any]) -> str:
    """Tables of plans and of speed, and what was not measured with the reason."""
    host = report["host"]
    lines = [
        f"# {host['gpu']}",
        "",
        f"SM {host['sm']}, driver {host['driver']}, CUDA {host['cuda']}, TensorRT {host['tensorrt']}, "
        f"{host['memory_bytes'] / 2**30:.0f} GiB. {report['created']}.",
        f"`{report['command']}`; {report['faces']['count']} {report['faces']['origin']} faces. "
        "Latency is the median of one caller with the faces and embeddings on the host.",
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
            lines += _table(["runtime", "batch", "callers", "faces/s", "median ms", "× PyTorch fp32"], rows)
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
    """One row a runtime and batch, with the ratio to eager PyTorch fp32 at the same batch where that was measured."""
    torch = entry.get("pytorch", {})
    base = {row["batch"]: row["faces_per_s"] for row in torch.get("fp32", {}).get("batches", [])}
    groups: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for precision, plan in entry["plans"].items():
        groups.append((f"TensorRT {precision}", plan.get("in_process", [])))
        served = plan.get("served", {})
        groups.append((f"TensorRT {precision}, tritonserver gRPC", served.get("rows", [])))
        groups.append((f"TensorRT {precision}, tritonserver, CUDA shared memory", served.get("cuda_rows", [])))
        groups.append((f"TensorRT {precision}, tritonserver, faces on the GPU", served.get("gpu_faces_rows", [])))
    groups.append(("ONNX Runtime CUDA fp32", entry.get("onnxruntime_cuda", [])))
    groups += [(f"PyTorch {p}", torch[p]["batches"]) for p in ("fp32", "fp16") if p in torch]
    rows = []
    for name, measured in groups:
        for row in measured:
            ratio = f"{row['faces_per_s'] / base[row['batch']]:.2f}" if row["batch"] in base else ""
            speed = f"{row['faces_per_s']:.0f}"
            rows.append([name, str(row["batch"]), str(row.get("callers", 1)), speed, f"{row['median_ms']:.2f}", ratio])
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(header) + " |"
    return [line, "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows), ""]
