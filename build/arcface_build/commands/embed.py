"""`arcface embed` writes the embeddings of face crops or photos to .npz or Parquet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arcface_build import terminal
from arcface_build.commands.options.output import NewOutput, hand_over, json_option
from arcface_build.commands.options.runner import Runner, engine_option, runtime_env_option
from arcface_build.commands.options.server import served_model_option, timeout_option, urls_option
from arcface_build.commands.options.settings import access_to
from arcface_clients.bulk.spec import UNIT_ROWS
from arcface_clients.errors import WrongUse
from arcface_clients.extras import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from arcface_clients import TritonEmbedder
    from arcface_clients.bulk.npz import Written
    from arcface_clients.photos.embedder import PhotoEmbedder

EPILOG = """\b
Examples:
  arcface embed crops/ -o embeddings.npz
  arcface embed 'people/*/*.jpg' -o people.npz --url grpc://gpu-host:8001
  arcface embed faces.npz -o embeddings.npz --force
  arcface embed photos/ -o photos.npz --detect            by the server, where it takes photos
  arcface embed photos/ -o photos.npz --detect=client     with the detector of this host
  arcface embed crops/ db.parquet -o all.parquet --url gpu-1:8001 --url gpu-2:8001
  arcface embed s3://data/crops/ -o s3://data/embeddings/ --url gpu-1:8001 --url gpu-2:8001 --engine ray

A .parquet output or a data set suits any number of faces: memory stays bounded, the same command resumes an interrupted
or killed run, and unreadable inputs are listed in OUTPUT.bad.jsonl or OUTPUT/_refused/. With --engine ray, the
machines of a Ray cluster run the job (docs/bulk.md).
"""


class DetectCommand(click.Command):
    """A command in which `--detect` alone means `--detect=auto`, whatever follows."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click would take the next word for the option's value."""
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, ["--detect=auto" if a == "--detect" else a for a in args[:end]] + args[end:])


@click.command(cls=DetectCommand, epilog=EPILOG, context_settings={"show_default": True})
@click.argument("sources", nargs=-1, required=True, metavar="FOLDER_OR_FILES...")
@click.option(
    "-o",
    "--output",
    type=NewOutput(),
    required=True,
    help="The .npz or .parquet to write; FOLDER/ or s3://BUCKET/FOLDER/ for a data set of Parquet parts.",
)
@urls_option
@served_model_option
@timeout_option
@click.option(
    "--detect",
    type=click.Choice(["auto", "client", "server"]),
    show_default=False,
    help="The sources are photos: find and align every face in them, on this host (--detect=client) or on the server "
    "(--detect=server); --detect alone: on the server where it takes photos.",
)
@click.option(
    "--detector",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="ARCFACE_DETECTOR",
    help="YuNet's ONNX.  [default: in ~/.cache/arcface-triton/detectors]",
)
@engine_option
@click.option("--actors", type=click.IntRange(1), help="Ray actors.  [default: two per served model instance]")
@runtime_env_option
@click.option("--unit-rows", type=click.IntRange(1), default=UNIT_ROWS, help="Faces in a part of a Parquet job.")
@click.option("--force", is_flag=True, help="Overwrite the output and start over.")
@json_option
def command(
    sources: tuple[str, ...],
    output: str,
    urls: tuple[str, ...],
    model: str,
    timeout_s: float,
    detect: str | None,
    detector: Path | None,
    engine: str,
    actors: int | None,
    runtime_env: Path | None,
    unit_rows: int,
    force: bool,
    as_json: bool,
) -> int:
    """Embed face crops (112×112, aligned) through a server.
    Sources: folders, files, globs, .npz, .npy, Parquet and .tar shards (WebDataset), here or as s3:// and gs:// URLs.

    Unreadable inputs are skipped and listed with the reason. A .npz contains `paths`, `embeddings` float32 (N,D) of
    unit length, `contract_id` and `model`; a .parquet the columns path, identity, embedding, contract_id and digest.
    With --detect, both record where each face was found, in pixels of the upright photo, and by which detector
    (docs/people.md).
    """
    name = Path(output)
    parquet = output.endswith("/") or "://" in output or name.suffix == ".parquet"
    if not parquet and name.suffix != ".npz":
        raise WrongUse(
            f"the output is {name.name!r}: expected a name ending in .npz or .parquet, such as {name.stem}.npz, or a "
            f"folder for a data set: {name.stem}/"
        )
    if name.is_file() and not force:
        raise WrongUse(f"{output} already exists. Choose another name, or overwrite it: --force")
    if not parquet and (len(urls) > 1 or engine == "ray"):
        raise WrongUse(f"several servers and --engine ray write Parquet. Name the output {name.stem}.parquet")
    remote = [source for source in sources if "://" in source and not source.startswith("file://")]
    if not parquet and remote:
        raise WrongUse(f"{remote[0]} is embedded to Parquet. Name the output {name.stem}.parquet")
    if parquet:
        require("pyarrow", *(("ray",) if engine == "ray" else ()), purpose=f"writing {name.name}")
    if detector is not None and not detect and not os.environ.get("ARCFACE_DETECTOR"):
        raise WrongUse("--detector is for photos: add --detect")
    photos = _photos_of_server(detect, urls[0], model, timeout_s, bool(detector)) if detect else None
    found_by = None
    if detect and photos is None:
        from arcface_clients.faces.detect import find_detector

        found_by = find_detector(detector).absolute()
    if parquet:
        from arcface_build.commands.embed_parquet import embed_to_parquet
        from arcface_clients.bulk.spec import ON_SERVER

        by = str(found_by) if found_by else None
        if photos is not None:
            photos.close()  # each worker makes its own
            by = ON_SERVER
        runner = Runner(engine, actors, runtime_env)
        return embed_to_parquet(sources, output, urls, model, timeout_s, by, runner, unit_rows, force, as_json)
    return _embed_to_npz(sources, name, urls[0], model, timeout_s, found_by, photos, as_json)


def _photos_of_server(detect: str, url: str, model: str, timeout_s: float, has_detector: bool) -> PhotoEmbedder | None:
    """The server's own way with photos, None where the detector of this host is used.

    Raises:
        WrongUse: the server was asked for, and this cannot be done there.
        ModelNotReady: the server was asked for, and does not take photos.
    """
    from arcface_clients import PhotoEmbedder
    from arcface_clients.errors import ModelNotReady

    only_here = [
        *["--detector"] * (has_detector and detect == "server"),
        *[f"--model {model}"] * (model != "arcface"),
    ]
    if detect == "client" or (detect == "auto" and (only_here or has_detector)):
        return None
    if only_here:
        raise WrongUse(f"the server finds faces for `arcface`, not with {only_here[0]}: --detect=client")
    photos = PhotoEmbedder(url, timeout_s=timeout_s, **access_to(url))
    try:
        photos.ensure_ready()
    except ModelNotReady:
        photos.close()
        if detect == "server":
            raise
        return None
    return photos


def _embed_to_npz(
    sources: tuple[str, ...],
    output: Path,
    url: str,
    model: str,
    timeout_s: float,
    detector: Path | None,
    photos: PhotoEmbedder | None,
    as_json: bool,
) -> int:
    from arcface_clients import TritonEmbedder
    from arcface_clients.bulk.files import plain
    from arcface_clients.faces.images import find_files

    files = find_files(map(plain, sources))
    with (
        TritonEmbedder(url, model, timeout_s=timeout_s, **access_to(url)) as embedder,
        terminal.item_bars() as progress,
    ):
        contract_id = embedder.ensure_ready().contract_id
        bar = progress.add_task("files", total=len(files))
        done = _embed(files, embedder, output, contract_id, model, detector, photos, lambda: progress.advance(bar))
    for crop in done.refused:
        terminal.complaint(terminal.visible(f"not read: {crop.name}: {crop.refused}"))
    if not done.faces:
        expected = "photos with a face" if detector or photos else "aligned 112×112 crops; photos need --detect"
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
        "detected_by": "server" if photos else "client" if detector else None,
        "refused": [{"path": crop.name, "reason": crop.refused} for crop in done.refused],
    }
    left_out = f", {len(done.refused)} not read" if done.refused else ""
    by = ", found by the server" if photos else ""
    told = f"{output}: {done.faces} embeddings of {done.embedding_dim} numbers from {model}{by}{left_out}"
    hand_over(summary, lambda: told, as_json)
    return 0


def _embed(
    files: list[str],
    embedder: TritonEmbedder,
    output: Path,
    contract_id: str | None,
    model: str,
    detector: Path | None,
    photos: PhotoEmbedder | None,
    on_file: Callable[[], None],
) -> Written:
    if photos is not None:
        from arcface_clients.photos.npz import embed_photos_to_npz

        with photos:
            return embed_photos_to_npz(files, photos, output, contract_id=contract_id, model=model, on_file=on_file)
    from arcface_clients.bulk.npz import embed_to_npz
    from arcface_clients.faces.detect import FaceDetector

    finder = FaceDetector(detector) if detector else None
    return embed_to_npz(files, embedder, output, contract_id=contract_id, model=model, detector=finder, on_file=on_file)
