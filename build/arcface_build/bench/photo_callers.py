"""Callers that send photos one after the other, and where the time and the CPU of a photo went meanwhile."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.bench.cpu_time import tree_cpu_by_pid
from arcface_build.bench.interleaved import Sample, Variant, Work
from arcface_build.bench.server import ServerUnderTest

STAGES = ("decode", "detect", "align", "embed")
METRICS_BEHIND_S = 0.7  # photo_faces tells Triton its sums twice a second
Answer = Callable[[bytes], int]
"""A photo's bytes in, the number of its faces out."""


def callers_of(
    name: str, answer: Answer, photos: Sequence[bytes], callers: int, server: ServerUnderTest | None = None
) -> Variant:
    """`callers` threads that answer photos in turn. Its "faces a second" are photos a second."""
    turn = count()

    def sample(seconds: float) -> Work:
        counted, spent_s = _counters(server), _cpu_s(server)
        started = time.perf_counter()
        with ThreadPoolExecutor(callers) as pool:
            each = [pool.submit(_call, answer, photos, turn, started + seconds) for _ in range(callers)]
            latencies_s = [latency_s for future in each for latency_s in future.result()]
        wall_s = time.perf_counter() - started
        ms_a_photo = 1000 / len(latencies_s)
        cpu_ms = {side: (now_s - spent_s[side]) * ms_a_photo for side, now_s in _cpu_s(server).items()}
        details: dict[str, Any] = {"cpu_ms_per_photo": cpu_ms}
        if server is not None:
            time.sleep(METRICS_BEHIND_S)
            details["ms_per_photo"] = _split(counted, _counters(server), 1000 * float(np.mean(latencies_s)))
        return Work(len(latencies_s), wall_s, [1000 * s for s in latencies_s], details=details)

    return Variant(name, sample, "server" if server else "process", (server.pid,) if server and server.pid else ())


def _call(answer: Answer, photos: Sequence[bytes], turn: Iterator[int], until: float) -> list[float]:
    """Answer photos, at least one, until that time of `time.perf_counter`; returns the seconds that each took."""
    latencies_s = []
    while True:
        sent = time.perf_counter()
        answer(photos[next(turn) % len(photos)])
        now = time.perf_counter()
        latencies_s.append(now - sent)
        if now >= until:
            return latencies_s


def cpu_by_part(samples: Sequence[Sample]) -> dict[str, float]:
    """Medians of the milliseconds of CPU a photo, by process."""
    return median_of([sample.details["cpu_ms_per_photo"] for sample in samples])


def _split(before: dict[str, float], after: dict[str, float], latency_ms: float) -> dict[str, float]:
    """Milliseconds of a photo by step, from Triton's metrics; the rest of the caller's time is receive and answer."""
    grown = {name: after[name] - before.get(name, 0) for name in after}
    photos = grown['arcface_photos{outcome="answered"}'] or 1
    request_us, queue_us = (
        sum(value for name, value in grown.items() if name.startswith(f"nv_inference_{kind}_duration_us"))
        for kind in ("request", "queue")
    )
    steps = {stage: grown[f'arcface_photo_stage_us{{stage="{stage}"}}'] / photos / 1000 for stage in STAGES}
    inside = request_us / photos / 1000
    queue = queue_us / photos / 1000
    return {
        "receive and answer": latency_ms - inside,
        "wait for an instance": queue,
        **steps,
        "between the steps": inside - queue - sum(steps.values()),
    }


def _counters(server: ServerUnderTest | None) -> dict[str, float]:
    """The metrics of `photo_faces` by their full names."""
    if server is None:
        return {}
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "photo" in name}


def _cpu_s(server: ServerUnderTest | None) -> dict[str, float]:
    """CPU seconds since their start: of this process, of tritonserver itself, and of each model's instances."""
    spent = {"this process": time.process_time()}
    if server is None or not server.pid:
        return spent
    for pid, seconds in tree_cpu_by_pid(server.pid).items():
        name = "tritonserver"
        if pid != server.pid:  # an instance of a Python model, whose first argument is the path of its version's file
            name = Path((Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")[1].decode()).parent.parent.name
        spent[name] = spent.get(name, 0) + seconds
    return spent


def median_of(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each entry."""
    return {name: float(np.median([each[name] for each in steps])) for name in steps[0]}
