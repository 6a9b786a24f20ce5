"""Runs the resumable job behind `arcface embed -o FILE.parquet`, and prints its summary."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from arcface_build import terminal
from arcface_build.commands.options.output import hand_over
from arcface_build.commands.options.settings import access_to
from arcface_clients import TritonEmbedder
from arcface_clients.bulk.job import Job, JobSpec, run_local
from arcface_clients.bulk.parts import bad_path
from arcface_clients.errors import WrongUse
from arcface_clients.triton.address import Access


def embed_to_parquet(
    sources: tuple[str, ...],
    output: Path,
    urls: tuple[str, ...],
    model: str,
    timeout_s: float,
    detector: Path | None,
    engine: str,
    actors: int | None,
    start_over: bool,
    as_json: bool,
) -> int:
    """Run the job, or what is left of it, and print the summary; returns 0.

    Raises:
        WrongUse: there is nothing to embed, or no face could be read.
        ArcFaceError: from the servers; running the same command again resumes the job.
    """
    connect = partial(_connect, model, timeout_s, {url: access_to(url) for url in urls})
    with ExitStack() as stack:
        engines = [stack.enter_context(connect(url)) for url in urls]
        served = engines[0].ensure_ready()
        spec = JobSpec(
            tuple(str(Path(source)) for source in sources),
            served.contract_id,
            engines[0].embedding_dim,
            detector=str(detector) if detector else None,
        )
        job = stack.enter_context(Job(output, spec, start_over))
        if not job.items:
            job.discard()
            raise WrongUse(f"nothing to embed in {' '.join(sources)}: expected images, .npz, .npy or Parquet files.")
        progress = stack.enter_context(terminal.item_bars())
        left = sum(1 for _ in job.pending())
        if left < job.units:
            terminal.notice(f"resuming: {job.units - left} of {job.units} units are already done")
        bar = progress.add_task("faces", total=job.items)
        progress.advance(bar, max(0, job.items - left * spec.unit_rows))
        if engine == "ray":
            from arcface_clients.bulk.on_ray import run_on_ray

            run_on_ray(job, connect, urls, actors or len(urls), partial(progress.advance, bar))
        else:
            run_local(job, engines, partial(progress.advance, bar))
        rows, refused = job.finish()
    if not rows:
        output.unlink()
        raise WrongUse(
            f"no face could be read from {' '.join(sources)}: {refused} refused, see {bad_path(output)}. Expected "
            + ("photos with a face." if detector else "aligned 112×112 crops; photos need --detect.")
            + f" {output} was not written"
        )
    summary = {
        "output": str(output),
        "faces": rows,
        "embedding_dim": spec.dim,
        "contract_id": spec.contract_id,
        "model": model,
        "refused": refused,
        "refused_list": str(bad_path(output)) if refused else None,
    }
    left_out = f", {refused} not read: {bad_path(output)}" if refused else ""
    told = f"{output}: {rows} embeddings of {spec.dim} numbers from {model}{left_out}"
    hand_over(summary, lambda: told, as_json)
    return 0


def _connect(model: str, timeout_s: float, access: dict[str, Access], url: str) -> TritonEmbedder:
    """Create a client for a server; at module level, so that Ray can pickle it."""
    return TritonEmbedder(url, model, timeout_s=timeout_s, **access[url])
