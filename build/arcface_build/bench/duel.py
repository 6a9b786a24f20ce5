"""Runs `arcface tune`: compares settings in duels between two real servers, and writes the winner."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arcface_build.bench.contestants import served
from arcface_build.bench.host import describe_host
from arcface_build.bench.interleaved import Sample, measure_in_turns, ratio, undisturbed_rounds
from arcface_build.bench.perf_analyzer import Load, PerfAnalyzer, write_input_data
from arcface_build.bench.server import ServerUnderTest, server_log
from arcface_build.bench.tune import (
    LEAF,
    Duel,
    Settings,
    base_config,
    read_settings,
    search,
    small_repository,
    write_tuned,
)
from arcface_build.serving.binary import find_tritonserver
from arcface_build.serving.ports import free_ports
from arcface_build.serving.process import TritonProcess


@dataclass(frozen=True)
class Tuning:
    """The load to tune for, and how long to measure."""

    batch: int = 8
    concurrency: int = 4
    latency_limit_ms: float | None = None
    rounds: int = 5
    sample_s: float = 2.0


def tune(
    repository: Path,
    tuning: Tuning,
    faces_bgr_u8: npt.NDArray[Any],
    program: PerfAnalyzer,
    progress: Callable[[str], None] = lambda told: None,
) -> dict[str, Any]:
    """Find the best settings of arcface_onnx; if they beat the shipped ones, write configs/tuned.pbtxt.

    Returns:
        The result as JSON of kind "tune" (docs/reports.md).
    """
    load, host = Load(LEAF, "grpc", tuning.batch, tuning.concurrency), describe_host()
    shipped = read_settings(base_config(repository))
    with tempfile.TemporaryDirectory(prefix="arcface-tune-") as name:
        data = write_input_data(faces_bgr_u8, Path(name) / "faces.json")
        number = iter(range(1000))

        def meet(champion: Settings, challenger: Settings) -> Duel:
            progress(f"{challenger}   against   {champion}")
            folder = Path(name) / str(next(number))
            return _duel(program, load, repository, folder, data, champion, challenger, tuning)

        cores = len(os.sched_getaffinity(0))
        best, duels = search(shipped, cores, tuning.batch, meet, tuning.latency_limit_ms)
    result: dict[str, Any] = {
        "format": 1,
        "kind": "tune",
        "host": host,
        "load": {
            "batch": tuning.batch,
            "concurrency": tuning.concurrency,
            "latency_limit_ms": tuning.latency_limit_ms,
        },
        "shipped": str(shipped),
        "best": str(best),
        "beaten": best != shipped,
        "duels": [duel.to_json() | {"won": duel.won(tuning.latency_limit_ms)} for duel in duels],
    }
    result["told"] = _told(result, duels[-1] if duels else None)
    if best != shipped:
        where = f"{host['cpu']}, {host['cores']} cores"
        note = f"Written by arcface tune for {tuning.concurrency} callers of {tuning.batch} faces on {where}.\n"
        files = write_tuned(repository, best, note + result["told"])
        result["written"] = [f"{path.parent.parent.name}/configs/{path.name}" for path in files]
    return result


def _told(result: dict[str, Any], last: Duel | None) -> str:
    """The outcome in words."""
    if last is None or not result["beaten"]:
        disturbed = sum(duel["disturbed"] for duel in result["duels"])
        told = f"{len(result['duels'])} duels: nothing beats the shipped config beyond chance ({result['shipped']})."
        quiet = f" {disturbed} of them were disturbed by other processes and do not count: use an idle machine."
        return told + quiet * (disturbed > 0)
    return (
        f"{result['best']}: {last.ratio} × the shipped config ({result['shipped']}), "
        f"p95 {last.challenger_p95_ms:.1f} ms, was {last.champion_p95_ms:.1f} ms. "
        "Serve it: arcface serve --model-config-name tuned"
    )


def _duel(
    program: PerfAnalyzer,
    load: Load,
    repository: Path,
    folder: Path,
    data: Path,
    champion: Settings,
    challenger: Settings,
    tuning: Tuning,
) -> Duel:
    """Start both servers, measure them interleaved, stop them."""
    variants = []
    with ExitStack() as stack:
        for name, settings in (("champion", champion), ("challenger", challenger)):
            small = small_repository(repository, settings, folder / name)
            log = stack.enter_context(server_log())
            server = stack.enter_context(
                TritonProcess(find_tritonserver(), small, [LEAF], config_name="", ports=free_ports(), log_path=log)
            )
            server.wait_ready()
            target = ServerUnderTest(server.grpc_url, server.http_url, server.pid)
            variants.append(replace(served(program, load, target, data), name=name))
        samples = measure_in_turns(variants, tuning.rounds, tuning.sample_s)
    kept, disturbed = undisturbed_rounds(samples)
    return Duel(
        champion,
        challenger,
        ratio=ratio(samples, "challenger", "champion", kept),
        champion_p95_ms=_p95_ms(samples["champion"], kept),
        challenger_p95_ms=_p95_ms(samples["challenger"], kept),
        champion_faces_per_s=_faces_per_s(samples["champion"], kept),
        challenger_faces_per_s=_faces_per_s(samples["challenger"], kept),
        disturbed=disturbed,
    )


def _p95_ms(samples: Sequence[Sample], rounds: Sequence[int]) -> float:
    return float(np.percentile([ms for r in rounds for ms in samples[r].latencies_ms], 95))


def _faces_per_s(samples: Sequence[Sample], rounds: Sequence[int]) -> float:
    return float(statistics.median(samples[r].faces_per_s for r in rounds))
