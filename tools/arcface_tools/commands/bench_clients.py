"""`scripts/bench clients`: our client over each transport against the bare runtime; memory of streams and bulk jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from arcface_build import terminal
from arcface_build.commands.options.numbers import NOT_NEGATIVE
from arcface_build.commands.options.output import hand_over, json_option, report_option

EPILOG = """\b
Examples:
  scripts/bench clients                              gRPC and shared memory against the bare session, batch 32
  scripts/bench clients --transport grpc-cudashm --transport grpc-gpufaces       on a GPU host: regions on the GPU
  scripts/bench clients --quick --in-flight 1 --in-flight 2 --in-flight 4 --in-flight 8
  scripts/bench clients --stream 1000000             peak memory while a million generated faces are streamed
  scripts/bench clients --restarts 10000             every face is answered once although server and model come and go
  scripts/bench clients --bulk 1000000               rate and memory of a bulk job to Parquet, without an engine
"""


@click.command("bench-clients", epilog=EPILOG)
@click.option("--model-repository", type=click.Path(path_type=Path), help="Default: model_repository/ here or above.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Faces per request.")
@click.option(
    "--transport",
    "transports",
    multiple=True,
    default=("grpc", "grpc-shm"),
    show_default=True,
    help="grpc or http, alone or with -shm, -cudashm, -gpufaces (faces already on the GPU). Repeatable.",
)
@click.option("--in-flight", multiple=True, default=(4,), show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--sample-s", default=5.0, show_default=True, type=NOT_NEGATIVE)
@click.option("--quick", is_flag=True, help="Use a trivial model, to measure only the client and the transport.")
@click.option("--stream", type=click.IntRange(1), help="Instead: memory of a stream of this many faces.")
@click.option(
    "--restarts", "requests", type=click.IntRange(1), help="Instead: this many requests across kills and swaps."
)
@click.option("--bulk", type=click.IntRange(1), help="Instead: rate and memory of a bulk job of this many faces.")
@json_option
@report_option
def command(
    model_repository: Path | None,
    batch: int,
    transports: tuple[str, ...],
    in_flight: tuple[int, ...],
    rounds: int,
    sample_s: float,
    quick: bool,
    stream: int | None,
    requests: int | None,
    bulk: int | None,
    as_json: bool,
    report: Path | None,
) -> None:
    """Measure our client and the bare ONNX Runtime session, interleaved in one run."""
    from arcface_build.bench.host import describe_host
    from arcface_build.bench.run import served_file
    from arcface_build.bench.server import own_server
    from arcface_build.reports.bench_text import bench_text
    from arcface_build.repository.find import find_repository
    from arcface_clients.errors import WrongUse
    from arcface_tools import bulk as bulk_job
    from arcface_tools import clients

    instead: list[tuple[str, int | None, Callable[[int], dict[str, Any]]]] = [
        ("stream", stream, clients.stream_memory),
        ("restarts", requests, clients.restarts),
        ("bulk", bulk, bulk_job.run),
    ]
    chosen = [(kind, count, measure) for kind, count, measure in instead if count]
    if len(chosen) > 1:
        raise WrongUse("--stream, --restarts and --bulk exclude each other: expected at most one.")
    if chosen:
        kind, count, measure = chosen[0]
        measured = measure(count)
        result = {"kind": kind, "host": describe_host(), **measured}
        hand_over(result, lambda: json.dumps(measured, indent=2), as_json, report)
        return
    if quick:
        with terminal.round_bar(len(transports) * len(in_flight) * (rounds + 1)) as advance:
            result = clients.run_quick(
                in_flight, transports, batch=batch, rounds=rounds, sample_s=sample_s, on_sample=advance
            )
    else:
        repository = find_repository(model_repository)
        with (
            own_server(repository, ("arcface_onnx",), "onnx") as target,
            terminal.round_bar((len(transports) * len(in_flight) + 1) * (rounds + 1)) as advance,
        ):
            result = clients.run(
                served_file(repository, "arcface_onnx", "model.onnx"),
                target.grpc_url,
                target.http_url,
                server_pid=target.pid,
                batch=batch,
                in_flight=in_flight,
                transports=transports,
                rounds=rounds,
                sample_s=sample_s,
                on_sample=advance,
            )
    hand_over(result, lambda: bench_text(result), as_json, report)
