"""`arcface consensus` finds each person's faces in a folder per person, and those that show somebody else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arcface_build import terminal
from arcface_build.commands.options.numbers import FiniteNumber
from arcface_build.commands.options.output import NewFile, hand_over, json_option
from arcface_build.commands.options.runner import Runner, engine_option, runtime_env_option
from arcface_build.commands.options.server import served_model_option, url_option
from arcface_build.commands.options.settings import access_to
from arcface_clients.atomic import write_json
from arcface_clients.contract import named_by
from arcface_clients.errors import WrongUse
from arcface_clients.extras import require
from arcface_clients.faces.images import load_faces
from arcface_clients.people.persons import FORMAT, VERSION, Journal, Limits, consensus_of_people, people_in

if TYPE_CHECKING:
    from arcface_clients.engines.protocol import EmbeddingEngine
    from arcface_clients.faces.detect import FaceDetector
    from arcface_clients.ray_cluster import Cluster

WORKERS = 4

EPILOG = """\b
Examples:
  arcface consensus people/ -o consensus.json
  arcface consensus photos/ -o consensus.json --detect
  arcface consensus people/ -o consensus.json --max-distance 0.58 --workers 8 --cache embeddings.sqlite
  arcface consensus /shared/people/ -o consensus.json --engine ray --url gpu-1:8001

Ctrl-C keeps finished people in OUTPUT.partial; the same command resumes from there.
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER_OF_PERSONS")
@click.option("-o", "--output", type=NewFile(), required=True, help="The .json to write.")
@url_option
@served_model_option
@click.option(
    "--max-distance",
    type=FiniteNumber(0, 1, min_open=True),
    default=Limits.max_distance,
    help="Limit from a face to the mean of the person's other faces (1 − cosine).",
)
@click.option("--min-support", type=click.IntRange(1), default=Limits.min_support, help="Faces that must agree.")
@click.option(
    "--min-share",
    type=FiniteNumber(0, 1, max_open=True),
    default=Limits.min_share,
    help="They must also exceed this share of all faces.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help=f"People processed at a time.  [default: {WORKERS}; with --engine ray, two per served model instance]",
)
@engine_option
@runtime_env_option
@click.option("--detect", is_flag=True, help="The files are photos: every face found in them is a candidate.")
@click.option(
    "--detector",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="ARCFACE_DETECTOR",
    help="YuNet's ONNX.  [default: in ~/.cache/arcface-triton/detectors]",
)
@click.option("--cache", "cache_path", type=click.Path(path_type=Path, dir_okay=False), help="Keep embeddings here.")
@click.option("--force", is_flag=True, help="Overwrite the output and start over.")
@json_option
def command(
    folder: Path,
    output: Path,
    url: str,
    model: str,
    max_distance: float,
    min_support: int,
    min_share: float,
    workers: int | None,
    engine: str,
    runtime_env: Path | None,
    detect: bool,
    detector: Path | None,
    cache_path: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Find who most photos in each person's folder show, and which photos show somebody else.

    FOLDER_OF_PERSONS has one folder of aligned 112×112 crops (with --detect: of photos) per person. The output lists
    each person's references, outliers with their distance, files that could not be read, and the consensus embedding.
    A person without a clear majority is undecided, and the groups of photos are listed.
    """
    from arcface_clients import TritonEmbedder
    from arcface_clients.triton.embedder import named_contract

    if output.exists() and not force:
        raise WrongUse(f"{output} already exists. Choose another name, or overwrite it: --force")
    on_ray = engine == "ray"
    _check_runner(on_ray, cache_path, runtime_env)
    found_by = None
    if detect:
        from arcface_clients.faces.detect import find_detector

        found_by = find_detector(detector).absolute()
    limits = Limits(max_distance, min_support, min_share)
    connect = partial(TritonEmbedder, url, model, **access_to(url))
    with connect() as embedder:
        served = embedder.ensure_ready()
        if named_by(embedder) is None:
            named_contract(embedder)  # known from here on, if its answers name it
        ray = OnRay(connect, Runner(engine, workers, runtime_env).cluster([served])) if on_ray else None
        records = run(folder, output, embedder, limits, workers or WORKERS, cache_path, force, found_by, ray)
    summary = _summary(output, records)
    if not as_json:
        for refused in (refused for record in records.values() for refused in record["refused"]):
            terminal.complaint(terminal.visible(f"not read: {refused['path']}: {refused['reason']}"))
    hand_over(summary, lambda: _told(records, summary), as_json)
    return 0


def _check_runner(on_ray: bool, cache_path: Path | None, runtime_env: Path | None) -> None:
    if on_ray and cache_path:
        raise WrongUse("--cache is a file of one host, which the workers of --engine ray do not share: leave it out")
    if runtime_env and not on_ray:
        raise WrongUse("--runtime-env is for Ray: add --engine ray")
    if on_ray:
        require("ray", purpose="--engine ray")


def _summary(output: Path, records: dict[str, dict]) -> dict[str, Any]:
    undecided = {name: record["reason"] for name, record in records.items() if not record["agreed"]}
    return {
        "output": str(output),
        "people": len(records),
        "agreed": len(records) - len(undecided),
        "outliers": sum(len(record["outliers"]) for record in records.values()),
        "refused": sum(len(record["refused"]) for record in records.values()),
        "undecided": undecided,
    }


def _told(records: dict[str, dict], summary: dict[str, Any]) -> str:
    lines = []
    for name, record in records.items():
        if record["agreed"]:
            lines += [f"outlier: {row['path']}: distance {row['distance']:.3f}" for row in record["outliers"]]
        else:
            lines.append(f"undecided: {name}: {record['reason']}")
            for number, group in enumerate(record["groups"], start=1):
                lines.append(f"  group {number}, {len(group)} faces: {', '.join(group)}")
    lines.append(
        f"{summary['output']}: {summary['agreed']} of {summary['people']} people agreed, "
        f"{summary['outliers']} outliers, {summary['refused']} files not read"
    )
    return "\n".join(lines)


def _nothing_read(folder: Path, records: dict[str, dict], photos: bool) -> str:
    refused = [crop for record in records.values() for crop in record["refused"]]
    first = f"; {refused[0]['path']}: {refused[0]['reason']}" if refused else ""
    expected = "photos with a face" if photos else "aligned 112×112 crops; photos need --detect"
    return (
        f"no face could be read from {folder} ({len(records)} people, {len(refused)} files refused{first}); "
        f"expected {expected}. Nothing was written"
    )


@dataclass(frozen=True)
class OnRay:
    """What a run on Ray needs: `connect` makes a worker's engine, `cluster` is what of Ray is used."""

    connect: Callable[[], EmbeddingEngine]
    cluster: Cluster


def run(
    folder: Path,
    output: Path,
    engine: EmbeddingEngine,
    limits: Limits,
    workers: int,
    cache_path: Path | None,
    start_over: bool,
    detector: Path | None = None,
    on_ray: OnRay | None = None,
) -> dict[str, dict]:
    """Write the records of everybody in `folder` to `output`, resuming an interrupted run; returns them by name.

    `detector`: the files are photos, and this is YuNet's file. `on_ray`: the people are tasks there, else threads here.
    """
    finder = _finder(detector)
    detector_id = finder.detector_id if finder else None
    people = people_in(folder)
    unfinished = output.with_name(f"{output.name}.partial")
    contract = named_by(engine)
    with Journal(unfinished, contract, limits, start_over, detector_id) as journal:
        left = journal.left(people)
        done = len(people) - len(left)
        if done:
            terminal.notice(f"resuming: {done} of {len(people)} people are already done")
        with terminal.item_bars() as progress:
            bar = progress.add_task("people", total=len(people), completed=done)

            def keep(record: dict[str, Any]) -> None:
                journal.add(record)
                progress.advance(bar)

            if on_ray:
                _on_ray(left, contract, limits, finder, on_ray, keep)
            else:
                _on_threads(left, engine, limits, workers, cache_path, finder, keep)
        records = {name: journal.records[name] for name in people}
        read_any = any(record["distances"] for record in records.values())
        if read_any:
            _write(output, records, engine.contract_id, contract, detector_id, limits)
        journal.close(delete=True)
    if not read_any:
        raise WrongUse(_nothing_read(folder, records, photos=finder is not None))
    return records


def _on_ray(
    people: Mapping[str, Sequence[str]],
    contract_id: str | None,
    limits: Limits,
    finder: FaceDetector | None,
    on_ray: OnRay,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    from arcface_clients.people.on_ray import consensus_on_ray

    consensus_on_ray(
        people,
        on_ray.connect,
        contract_id,
        keep,
        limits,
        detector=str(finder.model) if finder else None,
        detector_id=finder.detector_id if finder else None,
        cluster=on_ray.cluster,
        say=terminal.notice,
    )


def _on_threads(
    people: Mapping[str, Sequence[str]],
    engine: EmbeddingEngine,
    limits: Limits,
    workers: int,
    cache_path: Path | None,
    finder: FaceDetector | None,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    from arcface_clients.faces.detect import load_detected
    from arcface_clients.people.cache import EmbeddingCache

    with EmbeddingCache(path=cache_path) if cache_path else nullcontext() as cache:
        load = partial(load_detected, detector=finder) if finder else load_faces
        for record in consensus_of_people(people, engine, limits, workers=workers, cache=cache, load=load):
            keep(record)


def _write(
    output: Path,
    records: dict[str, dict],
    contract_id: str | None,
    named: str | None,
    detector_id: str | None,
    limits: Limits,
) -> None:
    write_json(
        output,
        {
            "format": FORMAT,
            "version": VERSION,
            "contract_id": contract_id,
            **({"contract_prefix": named} if contract_id is None and named else {}),
            **({"detector_id": detector_id} if detector_id else {}),
            "limits": vars(limits),
            "people": {name: {k: v for k, v in r.items() if k != "person"} for name, r in records.items()},
        },
    )


def _finder(detector: Path | None) -> FaceDetector | None:
    if detector is None:
        return None
    from arcface_clients.faces.detect import FaceDetector

    return FaceDetector(detector)
