"""Measures time and memory of distances, neighbours and gallery search on random embeddings, against naive code.

Methods are interleaved, so that ratios are of adjacent measurements; a method that takes microseconds is repeated, as
timeit does. Each time comes with the share of the processor used by others. Memory is what a fresh process needed for
that one call, including inputs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from arcface_build.bench.cpu_time import watch_cpu
from arcface_build.bench.host import describe_host
from arcface_clients.arrays import unit_rows
from arcface_clients.people.gallery import Gallery
from arcface_clients.people.neighbours import close_pairs, nearest
from arcface_clients.people.vectors import cosine_distance, cosine_distances

CLOSE = 0.75  # almost no random 512-d rows are this close: measures the search, not the listing of results
_SHORTEST_TURN_S = 0.1
_CHILD = """
import sys
import numpy as np
from arcface_clients.people.neighbours import nearest
rows = np.random.default_rng(0).standard_normal((int(sys.argv[1]), int(sys.argv[2])), np.float32)
nearest(rows, k=int(sys.argv[3]))
# Not ru_maxrss: that one begins with what the parent had when it started this process.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024)
"""


def run(
    large: int = 50_000, gallery_size: int = 100_000, dim: int = 512, k: int = 10, rounds: int = 3
) -> dict[str, Any]:
    """Measure and return the figures as JSON: times in ms, memory in MB, ratios, host.

    Args:
        large: rows among which to find nearest neighbours.
        gallery_size: embeddings in the gallery to search.
        dim: width of the embeddings.
        k: neighbours of each row.
        rounds: samples of each slow method; fast ones get more.
    """
    rng = np.random.default_rng(0)
    few, thousand, many = (rng.standard_normal((count, dim), np.float32) for count in (16, 1000, large))
    unit = unit_rows(many)
    report: dict[str, Any] = {
        "kind": "vectors",
        "host": describe_host(),
        "dim": dim,
        "k": k,
        "large": large,
        "gallery": gallery_size,
    }
    report["pairs_16"] = _compare(
        {
            "matrix product": lambda: cosine_distances(few),
            "120 single calls": lambda: [cosine_distance(few[i], few[j]) for i in range(16) for j in range(i)],
        },
        20 * rounds,
    )
    report["square_1000"] = _compare(
        {"matrix product": lambda: cosine_distances(thousand), "broadcast": lambda: _broadcast(thousand)}, 2 * rounds
    )
    product_mb = _allocated_mb(lambda: cosine_distances(thousand))
    report["square_1000"]["memory_mb"] = {
        "matrix product": product_mb,
        "broadcast": _allocated_mb(lambda: _broadcast(thousand)),
    }
    report["nearest"] = _compare(
        {
            "nearest, among themselves": lambda: nearest(many, k=k),
            "nearest, against others": lambda: nearest(many, unit, k=k),
            "pairs within a distance": lambda: close_pairs(many, max_distance=CLOSE),
            "bare product": lambda: _bare_product(unit),
        },
        rounds,
    )
    report["nearest"]["process_mb"] = _process_mb(large, dim, k)
    held = Gallery("0" * 64)
    rows = rng.standard_normal((gallery_size, dim), np.float32)
    for start in range(0, gallery_size, 4):
        held.add(str(start), rows[start : start + 4], "0" * 64)
    queries = rng.standard_normal((32, dim), np.float32)
    report["search"] = _compare(
        {
            "one query, five people": lambda: held.search(queries[0]),
            "32 queries, five people": lambda: held.search(queries),
            "bare product of one": lambda: rows @ queries[0],
        },
        10 * rounds,
    )
    return report


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    titles = {
        "pairs_16": "16 faces, 120 distances",
        "square_1000": "1,000 × 1,000 distances",
        "nearest": f"{report['large']:,} rows, top {report['k']}",
        "search": f"gallery of {report['gallery']:,}",
    }
    lines = []
    for key, title in titles.items():
        part = report[key]
        lines.append(f"{title} ({report['dim']}-d)")
        for name, figures in part["ways"].items():
            memory = part.get("memory_mb", {}).get(name)
            beside = f"  {memory:10.1f} MB" if memory is not None else ""
            lines.append(
                f"  {name:28} {figures['median_ms']:12.3f} ms  (best {figures['best_ms']:.3f}; others took "
                f"{100 * figures['foreign_share']:.0f} % of the processor){beside}"
            )
        for name, value in part["ratios"].items():
            lines.append(f"  {name:57} {value:8.4f}")
        if "process_mb" in part:
            lines.append(f"  peak RSS of a process that does it once {part['process_mb']:.0f} MB")
    return "\n".join(lines)


def _compare(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Each method once per round; ratios are medians over rounds, of each method to the last one."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    foreign: dict[str, float] = dict.fromkeys(ways, 0.0)
    repeats = {name: _calls_a_turn(way) for name, way in ways.items()}
    for _ in range(rounds):
        for name, way in ways.items():
            with watch_cpu() as cpu:
                times[name].append(1000 * _seconds(way, repeats[name]))
            foreign[name] += max(0.0, cpu.foreign_share) / rounds
    *others, base = ways
    return {
        "ways": {
            name: {
                "median_ms": statistics.median(values),
                "best_ms": min(values),
                "calls_a_turn": repeats[name],
                "foreign_share": foreign[name],
                "samples_ms": values if rounds <= 10 else None,
            }
            for name, values in times.items()
        },
        "ratios": {
            f"{name} / {base}": statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
            for name in others
        },
    }


def _calls_a_turn(way: Callable[[], object]) -> int:
    """Enough calls to be timed; the first call is not representative, because caches are cold."""
    if _seconds(way, 1) > 10 * _SHORTEST_TURN_S:
        return 1
    return max(1, round(_SHORTEST_TURN_S / _seconds(way, 1)))


def _seconds(way: Callable[[], object], calls: int) -> float:
    """Seconds of one call, as the mean of `calls`."""
    start = time.perf_counter()
    for _ in range(calls):
        way()
    return (time.perf_counter() - start) / calls


def _broadcast(rows: np.ndarray) -> np.ndarray:
    """Without a matrix product: every pair's elementwise product in memory at once."""
    norms = np.linalg.norm(rows, axis=1)
    return 1 - (rows[:, None, :] * rows[None, :, :]).sum(axis=-1) / (norms[:, None] * norms[None, :])


def _bare_product(unit: np.ndarray, height: int = 2048) -> None:
    """All similarities, computed and discarded: the minimum cost of any exhaustive search."""
    block = np.empty((height, len(unit)), np.float32)
    for start in range(0, len(unit), height):
        part = unit[start : start + height]
        np.dot(part, unit.T, out=block[: len(part)])


def _allocated_mb(way: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        way()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def _process_mb(count: int, dim: int, k: int) -> float:
    command = [sys.executable, "-c", _CHILD, str(count), str(dim), str(k)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
