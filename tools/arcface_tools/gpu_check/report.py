"""Renders the JSON of a run as Markdown; every figure comes from the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from arcface_tools.gpu_check.goals import KINDS, best_ms, goals
from arcface_tools.gpu_check.plan_timer import NOT_ASKED_FOR

Lines = Iterator[str]


def to_markdown(report: Mapping[str, Any]) -> str:
    """The goals, then a section for each stage, then what was not measured, with the reason."""
    host = report["host"]
    lines = [
        f"# {host['gpu']}",
        "",
        f"SM {host['sm']}, driver {host['driver']}, CUDA {host['cuda']}, TensorRT {host['tensorrt']}, "
        f"{host['memory_bytes'] / 2**30:.0f} GiB, Python {host['python']}, {host['cpus']} CPU cores. "
        f"{report['created']}.",
        *(f"`{command}`" for command in report["commands"]),
        f"{report['faces']['count']} {report['faces']['origin']} faces. Medians; the clocks, power and temperature "
        "during each measurement are in the JSON.",
        "",
    ]
    if "stopped" in report:
        lines += [f"**Stopped:** {report['stopped']}", ""]
    if told := goals(report):
        lines += ["## Goals", "", *_table(["goal", "expected", "measured", "met"], [goal.row() for goal in told])]
    gaps: list[str] = []
    for number, stage in sorted(report["stages"].items()):
        lines += [f"## {number}. {stage['title']}", ""]
        for name, step in stage["steps"].items():
            lines += list(_step(name, step["result"], report))
            if "why" in step:
                gaps.append(f"- {number}. {name}: {step['why']}")
            elif step.get("running"):
                gaps.append(f"- {number}. {name}: the process ended during it")
        gaps += [f"- {number}. {stage['title']}: {stage[key]}" for key in ("died", "not_started") if key in stage]
    if gaps:
        lines += ["## Not measured", "", *gaps]
    return "\n".join(lines).rstrip() + "\n"


def _step(name: str, result: Mapping[str, Any], report: Mapping[str, Any]) -> Lines:
    """The tables that fit what a step has measured; nothing for an empty result."""
    kinds = [key for key in _PARTS if key in result]
    if not result:
        return
    yield f"### {name}"
    yield ""
    if not kinds:
        yield "; ".join(f"{key}: {value}" for key, value in result.items())
        yield ""
    for key in kinds:
        yield from _PARTS[key](result, report)


def _plan(result: Mapping[str, Any], report: Mapping[str, Any]) -> Lines:
    plan = result["plan"]
    peak, drift = plan["peak_vram_bytes"], plan["max_drift"]
    yield (
        f"Built for batches {'/'.join(map(str, plan['batches']))} in {plan['build_seconds']:.1f} s, peak memory "
        f"{f'{peak / 2**30:.2f} GiB' if peak else 'not sampled'}, {plan['plan_bytes'] / 1e6:.1f} MB; layers "
        f"{', '.join(f'{count} {kind}' for kind, count in plan['layers'].items())}; drift "
        f"{'not measured' if drift is None else f'{drift:.1e}'} of {plan['limit']:g}"
        f"{'' if plan['passes_gate'] else ' (FAILED)'}."
    )
    yield ""
    if plan["refused"]:
        yield f"**Refused**, and measured all the same: {plan['refused']}"
        yield ""


def _figures(result: Mapping[str, Any], report: Mapping[str, Any]) -> Lines:
    rows = [
        [
            f"{row['what']} {row['kind']}",
            f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row.get('gb_per_s', 0):.0f} GB/s",
            *_clocks(row),
        ]
        for row in result["figures"]
        if "error" not in row
    ]
    yield from _table(["", "reached", *_CLOCKS], rows)
    yield from (f"{row['what']} {row['kind']} failed: {row['error']}" for row in result["figures"] if "error" in row)


def _rows(result: Mapping[str, Any], report: Mapping[str, Any]) -> Lines:
    """Of a plan alone, with its ratios to PyTorch; or of calls from host to host."""
    if not result["rows"] or "replays" not in result["rows"][0]:
        yield from _calls(result["rows"])
        return
    ways = _torch_ways(report)
    rows = []
    for row in result["rows"]:
        share = row["share_of_peak"]
        ratios = [_ratio(best_ms(ways, kind, row["batch"], "device_ms"), row["median_ms"]) for kind in KINDS]
        told = [f"{row['median_ms']:.3f}", f"{row['faces_per_s']:.0f}", f"{row['tflops']:.1f}"]
        told += [f"{share:.0%}" if share else "", f"{row['max_drift']:.1e}", "yes" if row["graph"] else "no"]
        rows.append([str(row["batch"]), *told, *_clocks(row), *ratios])
    head = ["batch", "ms", "faces/s", "TFLOP/s", "of the GEMM peak", "drift", "graph", *_CLOCKS]
    yield from _table([*head, *(f"× PyTorch {kind}" for kind in KINDS)], rows)
    refused = [row for row in result["rows"] if not row["graph"] and row["why_no_graph"] != NOT_ASKED_FOR]
    yield from (f"No graph at batch {row['batch']}: {row['why_no_graph']}.\n" for row in refused)


def _slowest(result: Mapping[str, Any], report: Mapping[str, Any]) -> Lines:
    kinds = sorted(result["ms_by_kind"].items(), key=lambda item: -item[1])
    yield f"{result['layers']} layers, {result['total_ms']:.3f} ms one by one: " + ", ".join(
        f"{kind} {ms:.3f}" for kind, ms in kinds
    )
    yield ""
    rows = [
        [row["layer"], str(row["kind"]), str(row["kernel"]), f"{row['ms']:.4f}", f"{row['share']:.1%}"]
        for row in result["slowest"]
    ]
    yield from _table(["layer", "kind", "kernel", "ms", "share"], rows)


def _drift(result: Mapping[str, Any], report: Mapping[str, Any]) -> Lines:
    drift = result["drift"]
    yield (
        f"{drift['faces']} faces: max drift {drift['max_drift']:.2e} of {result['limit']:g}, "
        f"{'passed' if result['passed'] else 'FAILED: ' + result['why']}."
    )
    yield ""


def _ways(result: Mapping[str, Any], report: Mapping[str, Any]) -> Lines:
    """PyTorch in several modes, or several ways to a server."""
    if isinstance(result["ways"], Mapping):
        for name, way in result["ways"].items():
            for key, where in (("rows", "on the host"), ("rows_of_gpu_faces", "on the GPU")):
                if way.get(key):
                    yield f"{name}, faces {where}; max drift {way['drift']['max_drift']:.1e}:"
                    yield ""
                    yield from _calls(way[key])
        return
    yield f"PyTorch {result.get('torch')}, CUDA {result.get('cuda')}, {result.get('python')}."
    yield ""
    rows = [
        [
            way_name(way),
            str(row["batch"]),
            f"{row['device_ms']:.3f}" if "device_ms" in row else "",
            f"{row['median_ms']:.3f}",
            f"{way['min_cosine']:.6f}",
            *_clocks(row),
        ]
        for way in result["ways"]
        for row in way.get("batches", [])
    ]
    yield from _table(["way", "batch", "ms on the GPU", "ms from host to host", "min cosine", *_CLOCKS], rows)
    yield from (f"{way_name(way)} failed: {way['error']}\n" for way in result["ways"] if "error" in way)


_PARTS = {
    "plan": _plan,
    "figures": _figures,
    "rows": _rows,
    "slowest": _slowest,
    "drift": _drift,
    "ways": _ways,
}
_CLOCKS = ("SM MHz", "W", "°C")


def way_name(way: Mapping[str, Any]) -> str:
    """A mode of PyTorch in full: "tf32 NHWC compiled"."""
    return f"{way['kind']} {way['layout']}{' compiled' * way['compiled']}"


def _calls(rows: Sequence[Mapping[str, Any]]) -> Lines:
    told = []
    for row in rows:
        share = row.get("of_the_plan_alone")
        figures = [f"{row['faces_per_s']:.0f}", f"{row['median_ms']:.2f}", f"{share:.2f}" if share else ""]
        told.append([str(row["batch"]), str(row["callers"]), *figures, *_clocks(row)])
    yield from _table(["batch", "in flight", "faces/s", "ms", "of the plan alone", *_CLOCKS], told)


def _torch_ways(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = report["stages"].get("4", {}).get("steps", {})
    return [way for step in steps.values() for way in step["result"].get("ways", ()) if "batches" in way]


def _clocks(row: Mapping[str, Any]) -> list[str]:
    gpu = row.get("gpu") or {}
    return [f"{gpu[key]:.0f}" if key in gpu else "" for key in ("sm_clock_mhz", "power_w", "temperature_c")]


def _ratio(base_ms: float | None, ms: float) -> str:
    return f"{base_ms / ms:.2f}" if base_ms else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(header) + " |"
    return [line, "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows), ""]
