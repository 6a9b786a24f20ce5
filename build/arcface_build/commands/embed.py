"""`arcface embed` writes the embeddings of face crops or photos to .npz or Parquet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arcface_build import terminal
from arcface_build.commands.options.output import NewFile, hand_over, json_option
from arcface_build.commands.options.server import served_model_option, timeout_option, urls_option
from arcface_build.commands.options.settings import access_to
from arcface_clients.errors import WrongUse
from arcface_clients.extras import require

if TYPE_CHECKING:
    pass

EPILOG = """\b
Examples:
  arcface embed crops/ -o embeddings.npz
  arcface embed 'people/*/*.jpg' -o people.npz --url grpc://gpu-host:8001
  arcface embed faces.npz -o embeddings.npz --force
  arcface embed photos/ -o photos.npz --detect
  arcface embed crops/ db.parquet -o all.parquet --url gpu-1:8001 --url gpu-2:8001

A .parquet output suits any number of faces: memory stays bounded, the same command resumes an interrupted or killed
run, and unreadable inputs are listed in OUTPUT.bad.jsonl. With --engine ray, Ray Data runs the job.
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.argument("sources", nargs=-1, required=True, metavar="FOLDER_OR_FILES...")
@click.option(
    "-o",
    "--output",
    type=NewFile(),
    required=True,
    help="The .npz or .parquet to write.",
)
@urls_option
@served_model_option
@timeout_option
@click.option("--detect", is_flag=True, help="The sources are photos: find and align every face in them.")
@click.option(
    "--detector",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="ARCFACE_DETECTOR",
    help="YuNet's ONNX.  [default: in ~/.cache/arcface-triton/detectors]",
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="What runs a .parquet job.")
@click.option("--actors", type=click.IntRange(1), help="Ray actors.  [default: one per URL]")
@click.option("--force", is_flag=True, help="Overwrite the output and start over.")
@json_option
def command(
    sources: tuple[str, ...],
    output: Path,
    urls: tuple[str, ...],
    model: str,
    timeout_s: float,
    detect: bool,
    detector: Path | None,
    engine: str,
    actors: int | None,
    force: bool,
    as_json: bool,
) -> int:
    """Embed face crops (112×112, aligned) from folders, files, globs, .npz, .npy or Parquet through a server.

    Unreadable inputs are skipped and listed with the reason. A .npz contains `paths`, `embeddings` float32 (N,D) of
    unit length, `contract_id` and `model`; a .parquet the columns path, identity, embedding, contract_id and digest.
    With --detect, both record where each face was found, in pixels of the upright photo (docs/people.md).
    """
    if output.suffix not in (".npz", ".parquet"):
        raise WrongUse(
            f"the output is {output.name!r}: expected a name ending in .npz or .parquet, such as {output.stem}.npz"
        )
    if output.exists() and not force:
        raise WrongUse(f"{output} already exists. Choose another name, or overwrite it: --force")
    if output.suffix == ".npz" and (len(urls) > 1 or engine == "ray"):
        raise WrongUse(f"several servers and --engine ray write Parquet. Name the output {output.stem}.parquet")
    if output.suffix == ".parquet":
        require("pyarrow", *(("ray",) if engine == "ray" else ()), purpose=f"writing {output.name}")
    if detect:
        from arcface_clients.faces.detect import find_detector

        detector = find_detector(detector)
    elif detector is not None and not os.environ.get("ARCFACE_DETECTOR"):
        raise WrongUse("--detector is for photos: add --detect")
    found_by = detector if detect else None
    if output.suffix == ".parquet":
        from arcface_build.commands.embed_parquet import embed_to_parquet

        return embed_to_parquet(sources, output, urls, model, timeout_s, found_by, engine, actors, force, as_json)
    return _embed_to_npz(sources, output, urls[0], model, timeout_s, found_by, as_json)


def _embed_to_npz(
    sources: tuple[str, ...],
    output: Path,
    url: str,
    model: str,
    timeout_s: float,
    detector: Path | None,
    as_json: bool,
) -> int:
    from arcface_clients import TritonEmbedder
    from arcface_clients.bulk.npz import embed_to_npz
    from arcface_clients.faces.images import find_files

    files, finder = find_files(sources), None
    if detector:
        from arcface_clients.faces.detect import FaceDetector

        finder = FaceDetector(detector)
    with (
        TritonEmbedder(url, model, timeout_s=timeout_s, **access_to(url)) as embedder,
        terminal.item_bars() as progress,
    ):
        contract_id = embedder.ensure_ready().contract_id
        bar = progress.add_task("files", total=len(files))
        done = embed_to_npz(
            files,
            embedder,
            output,
            contract_id=contract_id,
            model=model,
            detector=finder,
            on_file=lambda: progress.advance(bar),
        )
    for crop in done.refused:
        terminal.complaint(f"not read: {crop.name}: {crop.refused}")
    if not done.faces:
        expected = "photos with a face" if detector else "aligned 112×112 crops; photos need --detect"
        raise WrongUse(
            f"no face could be read from {' '.join(sources)} ({len(files)} files found, {len(done.refused)} refused); "
            f"expected {expected}. Nothing was written"
        )
    summary = {
        "output": str(output),
        "faces": done.faces,
        "embedding_dim": done.embedding_dim,
        "contract_id": contract_id,
        "model": model,
        "refused": [{"path": crop.name, "reason": crop.refused} for crop in done.refused],
    }
    left_out = f", {len(done.refused)} not read" if done.refused else ""
    told = f"{output}: {done.faces} embeddings of {done.embedding_dim} numbers from {model}{left_out}"
    hand_over(summary, lambda: told, as_json)
    return 0
