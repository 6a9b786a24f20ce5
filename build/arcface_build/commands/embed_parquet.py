"""Runs the resumable job behind `arcface embed` to Parquet, one file or a data set, and prints its summary."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from arcface_build import terminal
from arcface_build.commands.options.output import hand_over
from arcface_build.commands.options.runner import Runner
from arcface_build.commands.options.settings import access_to, settings
from arcface_clients import TritonEmbedder
from arcface_clients.bulk.files import Files, is_url
from arcface_clients.bulk.job import Counts, Job
from arcface_clients.bulk.on_threads import run_local
from arcface_clients.bulk.parts import bad_path
from arcface_clients.bulk.spec import ON_SERVER, JobSpec
from arcface_clients.bulk.work import PATIENCE_S
from arcface_clients.errors import WrongUse
from arcface_clients.photos.engine import PhotoEngine
from arcface_clients.s3 import S3Options
from arcface_clients.triton.address import Access
from arcface_clients.triton.embedder import named_contract


def embed_to_parquet(
    sources: tuple[str, ...],
    output: str,
    urls: tuple[str, ...],
    model: str,
    timeout_s: float,
    detector: str | None,
    runner: Runner,
    unit_rows: int,
    start_over: bool,
    as_json: bool,
) -> int:
    """Run the job, or what is left of it, and print the summary; returns 0.

    Raises:
        WrongUse: there is nothing to embed, or no face could be read.
        ArcFaceError: from the servers; running the same command again resumes the job.
    """
    kind = PhotoEngine if detector == ON_SERVER else TritonEmbedder
    connect = partial(_connect, kind, model, timeout_s, {url: access_to(url) for url in urls})
    with ExitStack() as stack:
        engines = [stack.enter_context(connect(url)) for url in urls]
        served = [engine.ensure_ready() for engine in engines[: len(urls) if runner.engine == "ray" else 1]]
        spec = JobSpec(
            tuple(source if is_url(source) else str(Path(source)) for source in sources),
            served[0].contract_id,
            engines[0].embedding_dim,
            unit_rows,
            detector=detector,
            detector_id=_detector_id(detector, engines[0]),
            contract_prefix=None if served[0].contract_id else named_contract(engines[0]),
        )
        job = stack.enter_context(Job(output, spec, start_over, _files()))
        begun = time.monotonic()
        with terminal.item_bars() as bars:
            shown = _Shown(bars, job)
            if runner.engine == "ray":
                from arcface_clients.bulk.on_ray import run_on_ray

                run_on_ray(job, connect, urls, runner.cluster(served), shown.advance, terminal.notice)
            else:
                run_local(job, engines, shown.advance, PATIENCE_S)
        done = _finished(job, sources)
        seconds = time.monotonic() - begun
    refused_list = _refused_list(output, job) if done.refused else None
    if not done.rows:
        if job.output is not None:
            job.output.unlink()
        expected = "photos with a face." if detector else "aligned 112×112 crops; photos need --detect."
        raise WrongUse(
            f"no face could be read from {' '.join(sources)}: {done.refused} refused, see {refused_list}. "
            f"Expected {expected} {output} was not written"
        )
    summary = {
        "output": output,
        "faces": done.rows,
        "embedding_dim": spec.dim,
        "contract_id": spec.contract_id,
        "model": model,
        "detected_by": None if detector is None else "server" if detector == ON_SERVER else "client",
        "detector_id": spec.detector_id,
        "refused": done.refused,
        "refused_list": refused_list,
        "set_aside": sorted(done.set_aside),
        "seconds": round(seconds, 3),
        "faces_per_s": round(shown.done / seconds, 1),
    }
    hand_over(summary, lambda: _told(summary), as_json)
    return 0


def _finished(job: Job, sources: tuple[str, ...]) -> Counts:
    """What the job gave, in its place; a job without units leaves nothing there.

    Raises:
        WrongUse: it had no units.
    """
    if not job.units:
        job.discard()
        raise WrongUse(f"nothing to embed in {' '.join(sources)}: expected images, .npz, .npy, Parquet or .tar files.")
    return job.finish()


def _told(summary: dict[str, Any]) -> str:
    by = ", found by the server" if summary["detected_by"] == "server" else ""
    left_out = f", {summary['refused']} not read: {summary['refused_list']}" if summary["refused"] else ""
    return (
        f"{summary['output']}: {summary['faces']} embeddings of {summary['embedding_dim']} numbers from "
        f"{summary['model']}{by}{left_out} ({summary['faces_per_s']:,} faces/s)"
    )


class _Shown:
    """The bar of a job, whose length is known once all units are listed."""

    def __init__(self, bars: terminal.Items, job: Job) -> None:
        self._bars, self._job = bars, job
        self._bar = bars.add_task("faces", total=None)
        self.done = 0

    def advance(self, count: int) -> None:
        """So many more entries are done in this run."""
        self.done += count
        before = self._job.before
        total = max(self._job.items, self.done + before) if self._job.is_listed else None
        self._bars.update(self._bar, completed=self.done + before, total=total)


def _files() -> Files:
    """URLs are opened with the settings of the plan store, S3's and MinIO's."""
    storage = settings().storage
    return Files(
        S3Options(
            storage.endpoint,
            storage.region,
            storage.path_style,
            max_attempts=storage.retries + 1,
            read_timeout_s=storage.timeout_s,
        )
    )


def _detector_id(detector: str | None, engine: TritonEmbedder) -> str | None:
    """Which detector finds the faces: what the server says, or the content of the file of this host."""
    if isinstance(engine, PhotoEngine):
        return engine.detector_id
    if detector is None:
        return None
    from arcface_clients.faces.detect import FaceDetector

    return FaceDetector(detector).detector_id


def _refused_list(output: str, job: Job) -> str:
    return str(bad_path(Path(output))) if job.output is not None else job.folder.of("_refused/")


def _connect(
    kind: type[TritonEmbedder], model: str, timeout_s: float, access: dict[str, Access], url: str
) -> TritonEmbedder:
    """Create a client for a server; at module level, so that Ray can pickle it."""
    return kind(url, model, timeout_s=timeout_s, **access[url])
