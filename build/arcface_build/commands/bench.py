"""`arcface bench` measures throughput through a server relative to runtimes in this process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, repository_at
from arcface_build.commands.options.numbers import NOT_NEGATIVE
from arcface_build.commands.options.output import NewFile, hand_over, html_option, json_option, report_option
from arcface_build.commands.options.settings import access_to, settings

EPILOG = """\b
Examples:
  arcface bench                                       own server, gRPC, batch 32, two callers, against the bare runtime
  arcface bench --insightface --report bench.json     also InsightFace in-process, one face per call and batched
  arcface bench --pytorch                             also eager PyTorch in-process, fp32
  arcface bench --protocol grpc --protocol grpc-shm --batch 1 --batch 32 --concurrency 1 --concurrency 4
  arcface bench --url gpu-host:8001 --http-url gpu-host:8000 --no-bare
  arcface bench --waterfall --batch 8 --html waterfall.html
  arcface bench --against bench.json                  exit 1 if a ratio fell by more than margin and spread
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_BENCH", "show_default": True})
@click.option("--model", "models", multiple=True, default=("arcface_onnx", "arcface"), help="Served model; repeatable.")
@click.option("--protocol", "protocols", multiple=True, default=("grpc",), help="grpc, grpc-shm, http, http-json …")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(32,), help="Faces per request.")
@click.option("--concurrency", "callers", multiple=True, type=click.IntRange(1), default=(2,), help="Parallel callers.")
@click.option("--bare/--no-bare", default=True, help="ONNX Runtime in this process: the base of the ratios.")
@click.option(
    "--spinning/--no-spinning", default=True, help="Whether the bare runtime's idle threads spin (its default)."
)
@click.option("--insightface", is_flag=True, help="InsightFace in this process, one face per call and batched.")
@click.option("--pytorch", is_flag=True, help="Eager PyTorch (fp32) in this process, one face per call and batched.")
@click.option("--onnx", type=click.Path(path_type=Path), help="ONNX for the bare runtime; default: the served one.")
@model_repository_option
@click.option("--config-name", default="onnx", help="Backend of the own server: onnx, tensorrt, reference, tuned.")
@click.option("--url", help="gRPC host:port of a running server; default: start one, and stop it at the end.")
@click.option("--http-url", help="Its HTTP host:port; default: the port below that of --url.")
@click.option("--faces", "sources", multiple=True, help="Crops to send (folder, files, .npz); default: synthetic.")
@click.option("--rounds", default=7, type=click.IntRange(1), help="Undisturbed rounds; each measures everything once.")
@click.option("--sample-s", default=3.0, type=NOT_NEGATIVE, help="Approximate length of a sample in seconds.")
@click.option("--waterfall", is_flag=True, help="Where the time goes, from bare runtime to HTTP JSON, one caller.")
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="An older result to compare with.")
@click.option(
    "--margin", default=0.03, type=NOT_NEGATIVE, help="Relative fall of a ratio, beyond the spread, that is worse."
)
@click.option("--csv", type=NewFile(), help="Also write one line per variant to this CSV file.")
@json_option
@report_option
@html_option
def command(
    model_repository: Path | None,
    config_name: str,
    url: str | None,
    http_url: str | None,
    sources: tuple[str, ...],
    against: Path | None,
    margin: float,
    csv: Path | None,
    as_json: bool,
    report: Path | None,
    html: Path | None,
    **asked_for: Any,
) -> int:
    """Measure throughput through the server and of the bare runtime, interleaved in one run."""
    from arcface_build.bench.faces import faces_for_load
    from arcface_build.bench.perf_analyzer import find_perf_analyzer
    from arcface_build.bench.result import read_result, regressions
    from arcface_build.bench.run import BenchRequest, run_benchmark
    from arcface_build.bench.server import running_server, still_to_choose
    from arcface_build.reports.bench_page import bench_csv, bench_page
    from arcface_build.reports.bench_text import bench_text

    old = read_result(against) if against else None
    asked = BenchRequest(**asked_for)
    target = running_server(url, http_url, access_to(url)) if url else None
    if target is None and (told := still_to_choose(repository_at(model_repository), config_name)):
        terminal.notice(told)
    program = find_perf_analyzer(settings().storage.cache, terminal.notice)
    result = run_benchmark(
        asked,
        faces_for_load(sources, max(asked.batches), terminal.complaint),
        program,
        repository=partial(repository_at, model_repository),
        config=config_name,
        target=target,
        bars=terminal.round_bar,
    )
    names = [Path(source).name for source in sources]  # reports are shared, so they name no local paths
    result |= {"faces_from": names or "synthetic"}
    pages = {csv: lambda: bench_csv(result), html: lambda: bench_page(result)}
    hand_over(result, lambda: bench_text(result), as_json, report, pages)
    worse = regressions(old, result, margin) if old else []
    for sentence in worse:
        terminal.complaint(f"worse than {against}: {sentence}")
    return 1 if worse else 0
