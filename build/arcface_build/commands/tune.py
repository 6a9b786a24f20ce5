"""`arcface tune`: a model repository and a load in; the best settings of this host, as configs/tuned.pbtxt, out."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np

    from arcface_build.bench.tune import Duel, Settings

EPILOG = """\b
Examples:
  arcface tune                                        most faces a second for four callers of eight faces
  arcface tune --batch 1 --concurrency 16 --latency-ms 100
  arcface tune --html tune.html --json tune.json      every duel, with the frontier as a plot
  arcface serve --model-config-name tuned             serves the result
"""


@click.command(epilog=EPILOG, context_settings={"auto_envvar_prefix": "ARCFACE_TUNE", "show_default": True})
@click.option("--batch", default=8, type=click.IntRange(1), help="Faces a request of the load to tune for.")
@click.option("--concurrency", default=4, type=click.IntRange(1), help="Callers at once.")
@click.option("--latency-ms", "latency_limit_ms", type=float, help="Largest p95; default: throughput alone counts.")
@click.option("--rounds", default=5, type=click.IntRange(3), help="Undisturbed rounds of a duel.")
@click.option("--sample-s", default=2.0, type=click.FloatRange(0), help="Seconds of one sample, about.")
@click.option("--faces", "sources", multiple=True, help="Crops to send (folder, files, .npz); default: drawn faces.")
@click.option("--model-repository", type=click.Path(path_type=Path), help="Default: model_repository/ here or above.")
@click.option("--json", "json_to", type=click.Path(path_type=Path), help="Write every duel; - prints them.")
@click.option("--html", "html_to", type=click.Path(path_type=Path), help="Write one page with the frontier.")
def command(
    batch: int,
    concurrency: int,
    latency_limit_ms: float | None,
    rounds: int,
    sample_s: float,
    sources: tuple[str, ...],
    model_repository: Path | None,
    json_to: Path | None,
    html_to: Path | None,
) -> int:
    """Search instances, threads, queue delay and largest batch of arcface_onnx through real servers.

    Writes configs/tuned.pbtxt when that beats the shipped config beyond chance; else says that it cannot.
    """
    from rich.console import Console

    from arcface_build.bench.host import describe_host
    from arcface_build.bench.perf_analyzer import Load, find_perf_analyzer, write_input_data
    from arcface_build.bench.tune import LEAF, base_config, read_settings, search, write_tuned
    from arcface_build.commands.bench import faces_of
    from arcface_build.reports.tune_page import tune_page
    from arcface_build.repository.versions import find_repository
    from arcface_clients.atomic import new_file, write_json

    repository = find_repository(model_repository)
    program, load, host = find_perf_analyzer(), Load(LEAF, "grpc", batch, concurrency), describe_host()
    shipped = read_settings(base_config(repository))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="arcface-tune-") as name, console.status("") as status:
        folder = Path(name)
        data = write_input_data(faces_of(sources, batch), folder / "faces.json")
        number = iter(range(1000))

        def duel(champion: Settings, challenger: Settings) -> Duel:
            if console.is_terminal:
                status.update(f"{challenger}   against   {champion}")
            return _duel(
                program, load, repository, folder / str(next(number)), data, champion, challenger, rounds, sample_s
            )

        best, duels = search(shipped, len(os.sched_getaffinity(0)), batch, duel, latency_limit_ms)
    result: dict[str, Any] = {
        "format": 1,
        "kind": "tune",
        "host": host,
        "load": {"batch": batch, "concurrency": concurrency, "latency_limit_ms": latency_limit_ms},
        "shipped": str(shipped),
        "best": str(best),
        "beaten": best != shipped,
        "duels": [d.to_json() | {"won": d.won(latency_limit_ms)} for d in duels],
    }
    told = _told(result, duels[-1] if duels else None)
    if best != shipped:
        where = f"{host['cpu']}, {host['cores']} cores"
        note = f"Written by arcface tune for {concurrency} callers of {batch} faces on {where}.\n{told}"
        result["written"] = [f"{p.parent.parent.name}/configs/{p.name}" for p in write_tuned(repository, best, note)]
    if json_to and str(json_to) != "-":
        write_json(json_to, result)
    if html_to:
        with new_file(html_to) as temporary:
            temporary.write_text(tune_page(result))
    click.echo(json.dumps(result, indent=2) if str(json_to) == "-" else told)
    return 0


def _told(result: dict[str, Any], last: Duel | None) -> str:
    """The outcome in words."""
    if not result["beaten"] or last is None:
        disturbed = sum(duel["disturbed"] for duel in result["duels"])
        told = f"{len(result['duels'])} duels: nothing beats the shipped config beyond chance ({result['shipped']})."
        quiet = f" {disturbed} of them were disturbed by other processes and count for nobody: use a quiet machine."
        return told + quiet * (disturbed > 0)
    return (
        f"{result['best']}: {last.ratio} × the shipped config ({result['shipped']}), "
        f"p95 {last.challenger_p95_ms:.1f} ms, was {last.champion_p95_ms:.1f} ms. "
        "Serve it: arcface serve --model-config-name tuned"
    )


def _duel(
    program: Any,
    load: Any,
    repository: Path,
    folder: Path,
    data: Path,
    champion: Settings,
    challenger: Settings,
    rounds: int,
    sample_s: float,
) -> Duel:
    """Both servers up, measured in turns, both down."""
    from contextlib import ExitStack

    from arcface_build.bench.contestants import served
    from arcface_build.bench.interleaved import measure_in_turns, ratio, undisturbed_rounds
    from arcface_build.bench.tune import LEAF, Duel, small_repository
    from arcface_build.serving.binary import find_tritonserver
    from arcface_build.serving.process import TritonProcess, free_ports

    variants = []
    with ExitStack() as stack:
        for name, settings in (("champion", champion), ("challenger", challenger)):
            small = small_repository(repository, settings, folder / name)
            log = folder / f"{name}.log"
            process = TritonProcess(
                find_tritonserver(), small, [LEAF], config_name="", ports=free_ports(), log_path=log
            )
            server = stack.enter_context(process)
            server.wait_ready()
            urls = {"grpc_url": server.grpc_url, "http_url": server.http_url}
            variant = served(program, load, **urls, input_data=data, server_pid=server.pid)
            variants.append(replace(variant, name=name))
        samples = measure_in_turns(variants, rounds, sample_s)
    kept, disturbed = undisturbed_rounds(samples)
    return Duel(
        champion,
        challenger,
        ratio(samples, "challenger", "champion", kept),
        champion_p95_ms=_p95(samples["champion"], kept),
        challenger_p95_ms=_p95(samples["challenger"], kept),
        champion_faces_per_s=_median([samples["champion"][r].faces_per_s for r in kept]),
        challenger_faces_per_s=_median([samples["challenger"][r].faces_per_s for r in kept]),
        disturbed=disturbed,
    )


def _p95(samples: Any, rounds: list[int]) -> float:
    import numpy as np

    return float(np.percentile([ms for r in rounds for ms in samples[r].latencies_ms], 95))


def _median(values: list[float] | np.ndarray) -> float:
    import statistics

    return float(statistics.median(values))
