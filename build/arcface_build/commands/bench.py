"""`arcface bench`: a model repository or a running server in; throughput ratios to the bare runtime out."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np

EPILOG = """\b
Examples:
  arcface bench                                       own server, gRPC, batch 32, two callers, against the bare runtime
  arcface bench --insightface --json bench.json       beside InsightFace in-process, one face a call and batched
  arcface bench --pytorch                             beside eager PyTorch in-process, fp32
  arcface bench --protocol grpc --protocol grpc-shm --batch 1 --batch 32 --concurrency 1 --concurrency 4
  arcface bench --url gpu-host:8001 --http-url gpu-host:8000 --no-bare
  arcface bench --waterfall --batch 8 --html waterfall.html
  arcface bench --against bench.json                  exit 1 when a ratio fell beyond margin and spread
"""


@dataclass(frozen=True)
class Target:
    """The server under test; `pid` only where it runs on this host."""

    grpc_url: str
    http_url: str
    pid: int | None


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_BENCH", "show_default": True})
@click.option("--model", "models", multiple=True, default=("arcface_onnx", "arcface"), help="Served model; repeatable.")
@click.option("--protocol", "protocols", multiple=True, default=("grpc",), help="grpc, grpc-shm, http, http-json …")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(32,), help="Faces a request.")
@click.option("--concurrency", "callers", multiple=True, type=click.IntRange(1), default=(2,), help="Callers at once.")
@click.option("--bare/--no-bare", default=True, help="ONNX Runtime in this process: what the ratios refer to.")
@click.option(
    "--spinning/--no-spinning", default=True, help="Whether the bare runtime's idle threads spin (its default)."
)
@click.option("--insightface", is_flag=True, help="InsightFace in this process, one face a call and batched.")
@click.option("--pytorch", is_flag=True, help="Eager PyTorch (fp32) in this process, one face a call and batched.")
@click.option("--onnx", type=click.Path(path_type=Path), help="Serving ONNX for the bare runtime; default: the served.")
@click.option("--model-repository", type=click.Path(path_type=Path), help="Default: model_repository/ here or above.")
@click.option("--config-name", default="onnx", help="Backend of the own server: onnx, tensorrt, reference, tuned.")
@click.option("--url", help="host:port of a running server's gRPC; default: start one and stop it.")
@click.option("--http-url", help="host:port of its HTTP; default: the port below --url's.")
@click.option("--faces", "sources", multiple=True, help="Crops to send (folder, files, .npz); default: drawn faces.")
@click.option("--rounds", default=7, type=click.IntRange(1), help="Undisturbed rounds; each measures everything once.")
@click.option("--sample-s", default=3.0, type=click.FloatRange(0), help="Seconds of one sample, about.")
@click.option("--json", "json_to", type=click.Path(path_type=Path), help="Write the result here; - prints it.")
@click.option("--csv", "csv_to", type=click.Path(path_type=Path), help="Write a line for each variant.")
@click.option("--html", "html_to", type=click.Path(path_type=Path), help="Write one page with plots.")
@click.option("--waterfall", is_flag=True, help="Where the time goes, from bare runtime to HTTP JSON, one caller.")
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="An older result to check against.")
@click.option("--margin", default=0.03, help="Relative fall of a ratio beyond the spread that counts as worse.")
def command(
    models: tuple[str, ...],
    protocols: tuple[str, ...],
    batches: tuple[int, ...],
    callers: tuple[int, ...],
    bare: bool,
    spinning: bool,
    insightface: bool,
    pytorch: bool,
    onnx: Path | None,
    model_repository: Path | None,
    config_name: str,
    url: str | None,
    http_url: str | None,
    sources: tuple[str, ...],
    rounds: int,
    sample_s: float,
    json_to: Path | None,
    csv_to: Path | None,
    html_to: Path | None,
    waterfall: bool,
    against: Path | None,
    margin: float,
) -> int:
    """Measure throughput through the server beside the bare runtime, in turns, in one run."""
    from arcface_build.bench import contestants
    from arcface_build.bench.host import describe_host
    from arcface_build.bench.interleaved import measure_in_turns
    from arcface_build.bench.perf_analyzer import Load, find_perf_analyzer, write_input_data
    from arcface_build.bench.pytorch import pytorch_sessions
    from arcface_build.bench.result import read_result, regressions, summarise
    from arcface_build.bench.waterfall import waterfall as waterfall_rows
    from arcface_build.bench.waterfall import waterfall_loads
    from arcface_build.reports.bench_page import bench_csv, bench_page
    from arcface_clients.atomic import new_file, write_json
    from arcface_clients.errors import WrongUse

    old = read_result(against) if against else None
    loads = [Load(*parts) for parts in product(models, protocols, batches, callers)]
    if waterfall:
        if len(batches) > 1 or not bare:
            raise WrongUse("--waterfall wants one --batch and the bare runtime; got several, or --no-bare.")
        loads, models = waterfall_loads(batches[0]), ("arcface_onnx", "arcface")
    program = find_perf_analyzer()
    faces = faces_of(sources, max(batches))
    host = describe_host()
    with (
        tempfile.TemporaryDirectory(prefix="arcface-bench-") as folder,
        server_under_test(url, http_url, model_repository, models, config_name, Path(folder)) as target,
    ):
        data = write_input_data(faces, Path(folder) / "faces.json")
        variants = []
        if bare:
            path = onnx or served_file(model_repository, "arcface_onnx", "model.onnx")
            variants += [contestants.bare_session(path, faces, batch, spinning=spinning) for batch in batches]
        if insightface:
            path = served_file(model_repository, "arcface_reference", "source.onnx")
            variants += contestants.insightface_sessions(path, faces, sorted({1, *batches}))
        if pytorch:
            path = served_file(model_repository, "arcface_reference", "source.onnx")
            variants += pytorch_sessions(path, faces, sorted({1, *batches}))
        variants += [
            contestants.served(
                program,
                load,
                grpc_url=target.grpc_url,
                http_url=target.http_url,
                input_data=data,
                server_pid=target.pid,
            )
            for load in loads
        ]
        with progress_of_rounds(len(variants) * (rounds + 1)) as advance:
            samples = measure_in_turns(variants, rounds, sample_s, advance)
    names = [Path(source).name for source in sources]  # a report travels, its paths would not
    result = summarise(variants, samples, host) | {"faces": len(faces), "faces_from": names or "drawn"}
    if waterfall:
        result["waterfall"] = waterfall_rows(samples, result["rounds"]["kept"], batches[0])
    for path, write in ((csv_to, bench_csv), (html_to, bench_page)):
        if path:
            with new_file(path) as temporary:
                temporary.write_text(write(result))
    if json_to and str(json_to) != "-":
        write_json(json_to, result)
    click.echo(json.dumps(result, indent=2) if str(json_to) == "-" else render(result))
    worse = regressions(old, result, margin) if old else []
    for sentence in worse:
        click.echo(f"worse than {against}: {sentence}", err=True)
    return 1 if worse else 0


def render(result: dict[str, Any]) -> str:
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
            lines += ["", f"{row['name']}: {ensemble_told(row['ensemble'])}"]
    lines += ["", "ratio of throughput, within a round: median (p10–p90)"] if result["ratios"] else [""]
    for row in result["ratios"]:
        lines.append(f"  {row['median']:.3f} ({row['low']:.3f}–{row['high']:.3f})  {row['variant']} / {row['base']}")
    for row in result.get("waterfall", []):
        over = row["over_bare_us"]
        lines.append(f"  {row['step']:26} {row['ms_per_face']['median']:8.3f} ms a face  {over['median']:+8.1f} µs")
    rounds = result["rounds"]
    lines.append(
        f"{len(rounds['kept'])} of {rounds['measured']} rounds kept: {result['host']['cpu']}, "
        f"{result['host']['cores']} cores, load {result['host']['load_1min']:.1f} at the start"
    )
    if rounds["disturbed"]:
        lines.append("NOT RELIABLE: other processes took CPU in nearly every round. Measure again on a quiet machine.")
    return "\n".join(lines)


def ensemble_told(cost: dict[str, Any]) -> str:
    """What an ensemble adds, in words: by Triton's own statistics of the same requests."""
    added, share = cost["added_ms"], cost["share_of_compute"]
    return (
        f"the ensemble adds {added['median']:.3f} ms ({added['low']:.3f}–{added['high']:.3f}) a request to "
        f"{cost['over']}: {share['median']:.4%} ({share['low']:.4%}–{share['high']:.4%}) of its compute time, "
        f"queue excluded; {added['count']} samples"
    )


@contextlib.contextmanager
def server_under_test(
    url: str | None, http_url: str | None, repository: Path | None, models: tuple[str, ...], config: str, folder: Path
) -> Iterator[Target]:
    """The running server that was named, else one of our own on free ports."""
    from arcface_build.bench.cpu_time import pid_listening_on
    from arcface_build.repository.versions import find_repository
    from arcface_build.serving.binary import find_tritonserver
    from arcface_build.serving.process import TritonProcess, free_ports
    from arcface_clients.errors import WrongUse

    if url:
        host, _, port = url.removeprefix("grpc://").rpartition(":")
        if not host or not port.isdecimal():
            raise WrongUse(f"--url is {url!r}: expected host:port of the server's gRPC, such as localhost:8001.")
        yield Target(
            f"{host}:{port}",
            http_url or f"{host}:{int(port) - 1}",
            pid_listening_on(int(port)) if host in ("localhost", "127.0.0.1") else None,
        )
        return
    found = find_repository(repository)
    check_served(found, models, config)
    binary = find_tritonserver()
    log = folder / "tritonserver.log"
    with TritonProcess(binary, found, models, config_name=config, ports=free_ports(), log_path=log) as server:
        server.wait_ready()
        yield Target(server.grpc_url, server.http_url, server.pid)


def check_served(repository: Path, models: tuple[str, ...], config: str) -> None:
    """Refuse names that Triton would not: it says little of a model that is not there, and nothing of a config.

    Raises:
        WrongUse: a model that the repository has not, or a config (configs/NAME.pbtxt) that no model of it has.
    """
    from arcface_clients.errors import WrongUse

    there = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if absent := [model for model in models if model not in there]:
        raise WrongUse(f"no model {', '.join(absent)} in {repository}: expected some of {', '.join(there)}.")
    configs = sorted({path.stem for path in repository.glob("*/configs/*.pbtxt")})
    if config and config not in configs:
        raise WrongUse(f"no model in {repository} has configs/{config}.pbtxt: expected one of {', '.join(configs)}.")


def served_file(repository: Path | None, model: str, name: str) -> Path:
    """The file of the newest version of a model in the repository."""
    from arcface_build.repository.versions import find_repository, served_folder

    return served_folder(find_repository(repository), model) / name


def faces_of(sources: tuple[str, ...], batch: int) -> np.ndarray:
    """Crops from files, else drawn ones: at least one batch."""
    from arcface_clients.faces.images import load_or_draw

    return load_or_draw(sources, max(64, batch), partial(click.echo, err=True))[0][: max(256, batch)]


@contextlib.contextmanager
def progress_of_rounds(total: int):
    """A bar on stderr when that is a terminal; yields the callback for `measure_in_turns`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("warming up", total=total)

        def advance(name: str, round_: int) -> None:
            bar.update(task, advance=1, description="warming up" if round_ < 0 else f"round {round_ + 1}: {name}")

        yield advance
