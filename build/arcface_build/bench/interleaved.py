"""Measures variants interleaved in one run, and gives medians, spreads and paired ratios.

On a shared machine absolute figures drift by tens of percent within minutes, but ratios of adjacent samples hardly do.
So each round measures every variant once, in rotating order, and ratios are taken within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from arcface_build.bench.cpu_time import CpuUse, watch_cpu
from arcface_build.bench.gpu_use import watch_gpu
from arcface_clients.errors import WrongUse

FOREIGN_LIMIT = 0.05  # a sample is dropped if other processes used more of the cores than this
MIN_ROUNDS = 3  # with fewer undisturbed rounds, keep the least disturbed ones and say so


@dataclass
class Work:
    """One sample of a variant: faces embedded and the time taken. `latencies_ms` has one number per call."""

    faces: int
    wall_s: float
    latencies_ms: Sequence[float] = ()
    faces_in_all: int = 0  # including those computed but not counted (warm-up); 0: the same
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def faces_per_s(self) -> float:
        """Throughput of this sample."""
        return self.faces / self.wall_s


@dataclass
class Variant:
    """Something to measure: `sample(seconds)` runs for about that long, `where` is "process" or "server"."""

    name: str
    sample: Callable[[float], Work]
    where: str = "process"
    server_pids: tuple[int, ...] = ()  # of servers on this host
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sample:
    """One sample of one variant. `cpu_ms_per_face`: CPU time of the process that computes, the server or this one."""

    round_number: int
    faces_per_s: float
    cpu_ms_per_face: float | None  # None if the server is on another host
    foreign_share: float
    latencies_ms: list[float]
    details: dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """A median with the 10th and 90th percentile."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of one or more values."""
        low, high = np.percentile(values, [10, 90])
        return cls(statistics.median(values), float(low), float(high), len(values))

    @property
    def half_width(self) -> float:
        """The larger distance from the median to either end."""
        return max(self.high - self.median, self.median - self.low)

    def to_json(self) -> dict[str, float]:
        """A JSON object with the keys median, low, high, count."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def measure_in_turns(
    variants: Sequence[Variant],
    rounds: int,
    sample_s: float,
    on_sample: Callable[[str, int], None] = lambda name, round_: None,
    foreign_limit: float = FOREIGN_LIMIT,
) -> dict[str, list[Sample]]:
    """Warm each variant up once, then measure `rounds` undisturbed rounds, at most twice as many in all.

    Returns samples by variant name, disturbed ones included; `undisturbed_rounds` chooses among them.
    """
    if len({v.name for v in variants}) != len(variants):
        raise WrongUse(f"variants must have different names, got {[v.name for v in variants]}.")
    for variant in variants:
        variant.sample(0.0)
        on_sample(variant.name, -1)
    samples: dict[str, list[Sample]] = {v.name: [] for v in variants}
    pids = {pid for variant in variants for pid in variant.server_pids}
    clean = 0
    for number in range(2 * rounds):
        shift = number % len(variants)
        for variant in [*variants[shift:], *variants[:shift]]:
            with watch_cpu(*pids) as cpu, watch_gpu() as gpu:
                work = variant.sample(sample_s)
            samples[variant.name].append(
                Sample(
                    round_number=number,
                    faces_per_s=work.faces_per_s,
                    cpu_ms_per_face=_cpu_ms_per_face(variant, cpu, work),
                    foreign_share=cpu.foreign_share,
                    latencies_ms=list(work.latencies_ms),
                    details=work.details | ({"gpu": gpu} if gpu else {}),
                )
            )
            on_sample(variant.name, number)
        clean += all(s[-1].foreign_share <= foreign_limit for s in samples.values())
        if clean >= rounds:
            break
    return samples


def _cpu_ms_per_face(variant: Variant, cpu: CpuUse, work: Work) -> float | None:
    if variant.where == "server" and not variant.server_pids:
        return None
    seconds = cpu.servers_s if variant.where == "server" else cpu.this_process_s
    return 1000 * seconds / (work.faces_in_all or work.faces)


def undisturbed_rounds(
    samples: Mapping[str, Sequence[Sample]], foreign_limit: float = FOREIGN_LIMIT
) -> tuple[list[int], bool]:
    """Rounds without a disturbed sample; if too few, the least disturbed MIN_ROUNDS, and True as a warning."""
    worst = [max(s.foreign_share for s in turn) for turn in zip(*samples.values(), strict=True)]
    clean = [number for number, share in enumerate(worst) if share <= foreign_limit]
    if len(clean) >= min(MIN_ROUNDS, len(worst)):
        return clean, False
    return sorted(sorted(range(len(worst)), key=worst.__getitem__)[:MIN_ROUNDS]), True


def ratio(samples: Mapping[str, Sequence[Sample]], name: str, base: str, rounds: Sequence[int]) -> Spread:
    """Throughput of `name` over that of `base`, paired within each of `rounds`."""
    return Spread.of([samples[name][r].faces_per_s / samples[base][r].faces_per_s for r in rounds])
