"""Renders the JSON of `arcface tune` as an HTML page with the frontier of latency and throughput."""

from __future__ import annotations

from typing import Any

from arcface_build.reports.page import figures, page, paragraph, section, table
from arcface_build.reports.plots import Axis, Series, lines


def tune_page(result: dict[str, Any]) -> str:
    """One page: outcome, frontier, every duel."""
    load = result["load"]
    limit = f", p95 at most {load['latency_limit_ms']:g} ms" if load["latency_limit_ms"] else ""
    outcome = (
        paragraph(f"Best: {result['best']}. Shipped: {result['shipped']}.", "good")
        if result["beaten"]
        else paragraph(f"Nothing beats the shipped config beyond chance: {result['shipped']}.")
    )
    rows = [
        (
            _told(duel["challenger"]),
            _told(duel["champion"]),
            f"{duel['ratio']['median']:.3f}",
            f"{duel['ratio']['low']:.3f}–{duel['ratio']['high']:.3f}",
            f"{duel['challenger_p95_ms']:.1f}",
            ("won", "good") if duel["won"] else ("disturbed", "note") if duel["disturbed"] else ("lost", ""),
        )
        for duel in result["duels"]
    ]
    head = ("challenger", "champion", "throughput ratio", "p10–p90", "p95 ms", "")
    blocks = [outcome]
    if result["duels"]:
        blocks.append(section("Frontier", figures(_frontier(result["duels"]))))
    blocks.append(section("Duels, each interleaved on two servers", table(head, rows)))
    subtitle = f"{load['concurrency']} callers of {load['batch']} faces{limit}; {result['host'].get('cpu', '')}"
    return page("Tuning of arcface_onnx", subtitle, *blocks)


def _frontier(duels: list[dict[str, Any]]) -> str:
    """Every setting once, as (p95, faces/s) of its last duel, and the Pareto frontier."""
    points: dict[str, tuple[float, float]] = {}
    for duel in duels:
        for side in ("champion", "challenger"):
            points[_told(duel[side])] = (duel[f"{side}_p95_ms"], duel[f"{side}_faces_per_s"])
    frontier = sorted(
        point
        for point in points.values()
        if not any(p[0] <= point[0] and p[1] >= point[1] and p != point for p in points.values())
    )
    x = Axis("p95, ms", 0, 1.1 * max(p[0] for p in points.values()))
    y = Axis("faces/s", 0, 1.1 * max(p[1] for p in points.values()))
    series = [Series("frontier", *map(list, zip(*frontier, strict=True)))]
    series += [Series(name, [point[0]], [point[1]]) for name, point in points.items()]
    return lines("Settings by latency and throughput", series, x, y, marks=True)


def _told(settings: dict[str, int]) -> str:
    threads = f"{settings['threads']} threads" if settings["threads"] else "all its threads"
    return (
        f"{settings['instances']} × {threads}, delay {settings['queue_delay_us']} µs, max batch {settings['max_batch']}"
    )
