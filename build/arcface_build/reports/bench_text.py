"""Renders a benchmark's result as text."""

from __future__ import annotations

from typing import Any


def bench_text(result: dict[str, Any]) -> str:
    """The result as text: a table of variants and the ratios below it."""
    lines = [f"{'':34} {'faces/s':>9} {'p10–p90':>17} {'CPU ms/face':>12} {'p50 ms':>9} {'p99 ms':>9}"]
    for row in result["variants"]:
        speed, cpu = row["faces_per_s"], row["cpu_ms_per_face"]
        used = f"{cpu['median']:.2f}" if cpu else "—"
        p50, p99 = (f"{row['latency_ms'][p]:.1f}" if row["latency_ms"] else "—" for p in ("p50", "p99"))
        lines.append(
            f"{row['name']:34} {speed['median']:9.1f} {speed['low']:8.1f}–{speed['high']:<8.1f} "
            f"{used:>12} {p50:>9} {p99:>9}"
        )
    for row in result["variants"]:
        if row.get("ensemble"):
            lines += ["", f"{row['name']}: {_ensemble_told(row['ensemble'])}"]
    lines += ["", "throughput ratio, within a round: median (p10–p90)"] if result["ratios"] else [""]
    for row in result["ratios"]:
        lines.append(f"  {row['median']:.3f} ({row['low']:.3f}–{row['high']:.3f})  {row['variant']} / {row['base']}")
    for row in result.get("waterfall", []):
        over = row["over_bare_us"]
        lines.append(f"  {row['step']:26} {row['ms_per_face']['median']:8.3f} ms/face  {over['median']:+8.1f} µs")
    rounds = result["rounds"]
    lines.append(
        f"{len(rounds['kept'])} of {rounds['measured']} rounds kept: {result['host']['cpu']}, "
        f"{result['host']['cores']} cores, load {result['host']['load_1min']:.1f} at the start"
    )
    if rounds["disturbed"]:
        lines.append("NOT RELIABLE: other processes used the CPU in nearly every round. Measure on an idle machine.")
    return "\n".join(lines)


def _ensemble_told(cost: dict[str, Any]) -> str:
    """The overhead of an ensemble in words, from Triton's statistics of the same requests."""
    added, share = cost["added_ms"], cost["share_of_compute"]
    return (
        f"the ensemble adds {added['median']:.3f} ms ({added['low']:.3f}–{added['high']:.3f}) per request to "
        f"{cost['over']}: {share['median']:.4%} ({share['low']:.4%}–{share['high']:.4%}) of its compute time, "
        f"queue excluded; {added['count']} samples"
    )
