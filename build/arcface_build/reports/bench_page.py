"""Renders the JSON of `arcface bench` as an HTML page and as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from arcface_build.reports.page import figures, page, paragraph, section, table
from arcface_build.reports.plots import Axis, Series, lines, ranges, waterfall

_COLUMNS = ["variant", "where", "faces_per_s", "faces_per_s_p10", "faces_per_s_p90", "cpu_ms_per_face"]
_COLUMNS += ["p50_ms", "p90_ms", "p99_ms", "queue_ms", "compute_ms", "ratio_to_bare"]
_COLUMNS += ["ensemble_added_ms", "ensemble_added_ms_p10", "ensemble_added_ms_p90", "ensemble_share_of_compute"]


def bench_page(result: dict[str, Any]) -> str:
    """One page: ratios, ensemble overhead, waterfall, latency against throughput, every variant, and the host."""
    blocks = []
    if result["rounds"]["disturbed"]:
        blocks.append(paragraph("Not reliable: other processes took CPU in nearly every round.", "bad"))
    rows = [
        (row["variant"], row["base"], f"{row['median']:.3f}", f"{row['low']:.3f}–{row['high']:.3f}")
        for row in result["ratios"]
    ]
    ratios = [(f"{row['variant']} / {row['base']}", row["low"], row["median"], row["high"]) for row in result["ratios"]]
    rates = [(row["name"], row["faces_per_s"]) for row in result["variants"]]
    speeds = [(name, rate["low"], rate["median"], rate["high"]) for name, rate in rates]
    plots = [ranges("Throughput ratios: median, p10–p90", ratios, one=True)] if ratios else []
    blocks.append(
        section(
            "Throughput ratios",
            paragraph("Taken within a round, so that slow minutes of the machine cancel: median, p10–p90.", "soft"),
            figures(*plots, ranges("Faces per second: median, p10–p90", speeds)),
            table(("variant", "over", "ratio", "spread"), rows),
        )
    )
    ensembles = _ensembles(result["variants"])
    if ensembles:
        told = (
            "Triton's total time of the ensemble minus that of the model inside it, in the same requests; the share is "
            "of that model's compute time (input, inference, output; queue excluded). Median over samples, p10–p90."
        )
        head = ("variant", "over", "added, ms/request", "p10–p90", "compute, ms/request", "share", "p10–p90")
        blocks.append(section("Ensemble overhead", paragraph(told, "soft"), table(head, ensembles)))
    if result.get("waterfall"):
        blocks.append(section("Where the time goes", figures(_waterfall(result["waterfall"]))))
    curves = _curves(result["variants"])
    if curves:
        blocks.append(section("Latency and throughput", figures(curves)))
    blocks.append(section("All variants", table(*_variants(result["variants"]))))
    blocks.append(
        section("Host", table(("", ""), [(key, (_told(value), "wrap")) for key, value in result["host"].items()]))
    )
    kept, measured = len(result["rounds"]["kept"]), result["rounds"]["measured"]
    facts = [_model(result.get("served")), result.get("created", ""), f"{kept} of {measured} rounds kept"]
    return page("Benchmark", "; ".join([*filter(None, facts), result["host"].get("cpu", "")]), *blocks)


def _model(served: dict[str, Any] | None) -> str:
    """What was measured; older results do not say."""
    if served is None:
        return ""
    return f"{served['name'] or served['model']} ({served['precision']}), contract {served['contract_id'] or 'unknown'}"


def bench_csv(result: dict[str, Any]) -> str:
    """CSV with one line per variant: medians and spreads."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    ratios = {row["variant"]: row["median"] for row in result["ratios"] if row["base"].startswith("bare")}
    for row in result["variants"]:
        speed, cpu, latency = row["faces_per_s"], row["cpu_ms_per_face"], row["latency_ms"] or {}
        leaf, cost = _leaf(row), row.get("ensemble")
        writer.writerow(
            [
                row["name"],
                row["where"],
                *(f"{speed[key]:.3f}" for key in ("median", "low", "high")),
                f"{cpu['median']:.4f}" if cpu else "",
                *(f"{latency[key]:.3f}" if key in latency else "" for key in ("p50", "p90", "p99")),
                f"{leaf['queue_ms']:.3f}" if leaf else "",
                f"{leaf['compute_infer_ms']:.3f}" if leaf else "",
                f"{ratios[row['name']]:.4f}" if row["name"] in ratios else "",
                *(f"{cost['added_ms'][key]:.4f}" if cost else "" for key in ("median", "low", "high")),
                f"{cost['share_of_compute']['median']:.6f}" if cost else "",
            ]
        )
    return text.getvalue()


def _variants(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("variant", "faces/s", "p10–p90", "CPU ms/face", "p50 ms", "p99 ms", "queue ms", "compute ms", "faces/batch")
    cells: list[tuple[str, ...]] = []
    for row in rows:
        speed, cpu, latency, leaf = row["faces_per_s"], row["cpu_ms_per_face"], row["latency_ms"], _leaf(row)
        cells.append(
            (
                row["name"],
                f"{speed['median']:.1f}",
                f"{speed['low']:.1f}–{speed['high']:.1f}",
                f"{cpu['median']:.2f}" if cpu else "—",
                f"{latency['p50']:.1f}" if latency else "—",
                f"{latency['p99']:.1f}" if latency else "—",
                f"{leaf['queue_ms']:.2f}" if leaf else "—",
                f"{leaf['compute_infer_ms']:.2f}" if leaf else "—",
                f"{leaf['faces_per_execution']:.1f}" if leaf else "—",
            )
        )
    return head, cells


def _ensembles(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row per variant that called an ensemble."""
    cells: list[tuple[str, ...]] = []
    for row in rows:
        if cost := row.get("ensemble"):  # older results have none
            added, share = cost["added_ms"], cost["share_of_compute"]
            cells.append(
                (
                    row["name"],
                    cost["over"],
                    f"{added['median']:.3f}",
                    f"{added['low']:.3f}–{added['high']:.3f}",
                    f"{cost['compute_ms']['median']:.1f}",
                    f"{share['median']:.4%}",
                    f"{share['low']:.4%}–{share['high']:.4%}",
                )
            )
    return cells


def _leaf(row: dict[str, Any]) -> dict[str, float] | None:
    """Triton's statistics of the model that computes: the slowest of those involved (an ensemble only sums)."""
    server = {name: split for name, split in (row.get("server") or {}).items() if name != "arcface"}
    return max(server.values(), key=lambda split: split["compute_infer_ms"], default=None)


def _waterfall(rows: list[dict[str, Any]]) -> str:
    steps = []
    for i, row in enumerate(rows):
        ms, over = row["ms_per_face"]["median"], row["over_bare_us"]
        more = f", {over['median']:+.0f} µs ({over['low']:+.0f} … {over['high']:+.0f})" if i else ""
        steps.append((row["step"], ms, f"{ms:.3f} ms{more}"))
    return waterfall("From the bare runtime to the caller, one caller", steps, "ms/face")


def _curves(rows: list[dict[str, Any]]) -> str:
    """Throughput over median latency: a curve per model, protocol and batch with several caller counts."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["where"] == "server" and row["latency_ms"]:
            name = f"{row['model']} {row['protocol']} b{row['batch']}"
            groups.setdefault(name, []).append((row["latency_ms"]["p50"], row["faces_per_s"]["median"]))
    series = [
        Series(name, *map(list, zip(*sorted(points), strict=True)))
        for name, points in groups.items()
        if len(points) > 1
    ]
    if not series:
        return ""
    most_x, most_y = max(max(s.x) for s in series), max(max(s.y) for s in series)
    x, y = Axis("median latency, ms", 0, 1.1 * most_x), Axis("faces/s", 0, 1.1 * most_y)
    return lines("One point per number of callers", series, x, y, marks=True)


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {told}" for key, told in value.items())
    if isinstance(value, list):
        return ", ".join(_told(item) for item in value) or "none"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
