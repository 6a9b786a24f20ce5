"""`arcface tune` finds the best settings of this host for a load, and writes configs/tuned.pbtxt."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, repository_at
from arcface_build.commands.options.numbers import NOT_NEGATIVE, POSITIVE
from arcface_build.commands.options.output import hand_over, html_option, json_option, report_option
from arcface_build.commands.options.settings import settings

EPILOG = """\b
Examples:
  arcface tune                                        most faces per second for four callers of eight faces
  arcface tune --batch 1 --concurrency 16 --latency-ms 100
  arcface tune --html tune.html --report tune.json    every duel, and a plot of the frontier
  arcface serve --model-config-name tuned             serve the result
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_TUNE", "show_default": True})
@click.option("--batch", default=8, type=click.IntRange(1), help="Faces per request of the load to tune for.")
@click.option("--concurrency", default=4, type=click.IntRange(1), help="Parallel callers.")
@click.option("--latency-ms", "latency_limit_ms", type=POSITIVE, help="Largest p95; default: only throughput counts.")
@click.option("--rounds", default=5, type=click.IntRange(3), help="Undisturbed rounds per duel.")
@click.option("--sample-s", default=2.0, type=NOT_NEGATIVE, help="Approximate length of a sample in seconds.")
@click.option("--faces", "sources", multiple=True, help="Crops to send (folder, files, .npz); default: synthetic.")
@model_repository_option
@json_option
@report_option
@html_option
def command(
    batch: int,
    concurrency: int,
    latency_limit_ms: float | None,
    rounds: int,
    sample_s: float,
    sources: tuple[str, ...],
    model_repository: Path | None,
    as_json: bool,
    report: Path | None,
    html: Path | None,
) -> None:
    """Find the best instances, threads, queue delay and largest batch of arcface_onnx, with real servers.

    Writes configs/tuned.pbtxt if the result beats the shipped config beyond chance; otherwise says so.
    """
    from arcface_build.bench.duel import Tuning, tune
    from arcface_build.bench.faces import faces_for_load
    from arcface_build.bench.perf_analyzer import find_perf_analyzer
    from arcface_build.reports.tune_page import tune_page

    repository, program = repository_at(model_repository), find_perf_analyzer(settings().storage.cache, terminal.notice)
    faces = faces_for_load(sources, batch, terminal.complaint)
    with terminal.status_line() as progress:
        tuning = Tuning(batch, concurrency, latency_limit_ms, rounds, sample_s)
        result = tune(repository, tuning, faces, program, progress)
    hand_over(result, lambda: result["told"], as_json, report, {html: lambda: tune_page(result)})
