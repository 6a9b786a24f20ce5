"""`arcface embed`: face crops, or photos, in; their embeddings and names, as .npz or Parquet, out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arcface_build.commands.item_progress import item_progress
from arcface_build.commands.server_option import access_to, urls_option
from arcface_clients.atomic import new_file
from arcface_clients.errors import WrongUse

if TYPE_CHECKING:
    import numpy as np

    from arcface_clients.faces.images import Found

EPILOG = """\b
Examples:
  arcface embed crops/ -o embeddings.npz
  arcface embed 'people/*/*.jpg' -o people.npz --url grpc://gpu-host:8001
  arcface embed faces.npz -o embeddings.npz --force
  arcface embed photos/ -o photos.npz --detect
  arcface embed crops/ db.parquet -o all.parquet --url gpu-1:8001 --url gpu-2:8001

A .parquet output is for any number of faces: memory stays bounded, an interrupted or killed run is gone on with by the
same command, what could not be read is listed in OUTPUT.bad.jsonl. With --engine ray Ray Data does it.
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.argument("sources", nargs=-1, required=True, metavar="FOLDER_OR_FILES...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The .npz or .parquet to write.",
)
@urls_option
@click.option("--model", default="arcface", help="Served model.")
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=120.0, help="Longest wait for one request."
)
@click.option("--detect", is_flag=True, help="The sources are photos: find and align every face in them.")
@click.option(
    "--detector",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="ARCFACE_DETECTOR",
    help="YuNet's ONNX.  [default: in ~/.cache/arcface-triton/detectors]",
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="Who does the work of a .parquet.")
@click.option("--actors", type=click.IntRange(1), help="Ray actors.  [default: one a URL]")
@click.option("--force", is_flag=True, help="Overwrite the output, start an unfinished one over.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
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

    What cannot be read is listed with the reason and left out. A .npz holds `paths`, `embeddings` float32 (N,D) of
    unit length, `contract_id` and `model`; a .parquet the columns path, identity, embedding, contract_id and digest.
    With --detect both hold where each face was found, in pixels of the upright photo (docs/people.md).
    """
    if output.suffix not in (".npz", ".parquet"):
        raise WrongUse(
            f"the output is {output.name!r}; expected a name that ends in .npz or .parquet, such as {output.stem}.npz"
        )
    if output.exists() and not force:
        raise WrongUse(f"{output} is there already. Choose another name, or overwrite it: --force")
    if output.suffix == ".npz" and (len(urls) > 1 or engine == "ray"):
        raise WrongUse(f"several servers and --engine ray write Parquet. Name the output {output.stem}.parquet")
    if detect:
        from arcface_clients.faces.detect import find_model

        detector = find_model(detector)
    elif detector is not None and "ARCFACE_DETECTOR" not in os.environ:
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
    import json

    import numpy as np

    from arcface_clients import TritonEmbedder
    from arcface_clients.faces.images import Crop, find_files, read_crops

    files = find_files(sources)
    names: list[str] = []
    refused: list[Crop] = []
    found: list[Found] = []
    with (
        TritonEmbedder(url, model, timeout_s=timeout_s, **access_to(url)) as embedder,
        item_progress() as progress,
    ):
        served = embedder.ensure_ready()
        bar = progress.add_task("files", total=len(files))

        def told() -> Iterator[str]:
            for name in files:
                yield name
                progress.advance(bar)

        crops = read_crops(told())
        if detector:
            from arcface_clients.faces.detect import FaceDetector, detect_crops

            crops = detect_crops(told(), FaceDetector(detector))

        def readable() -> Iterator[np.ndarray]:
            for crop in crops:
                if crop.face is None:
                    refused.append(crop)
                else:
                    names.append(crop.name)
                    if crop.found is not None:
                        found.append(crop.found)
                    yield crop.face

        rows = list(embedder.encode_stream(readable()))  # files are read while the server works
        dim = embedder.embedding_dim
    for crop in refused:
        click.echo(f"not read: {crop.name}: {crop.refused}", err=True)
    if not names:
        raise WrongUse(
            f"no face could be read from {' '.join(sources)} ({len(files)} files found, {len(refused)} refused); "
            + (
                "expected photos that show a face."
                if detector
                else "expected aligned 112×112 crops; photos need --detect."
            )
            + " Nothing was written"
        )
    embeddings = np.stack(rows)
    with new_file(output) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            paths=np.array(names),
            embeddings=embeddings,
            contract_id=np.array(served.contract_id or ""),
            model=np.array(model),
            **_places(found) if detector else {},
        )
    summary = {
        "output": str(output),
        "faces": len(names),
        "embedding_dim": dim,
        "contract_id": served.contract_id,
        "model": model,
        "refused": [{"path": crop.name, "reason": crop.refused} for crop in refused],
    }
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        left_out = f", {len(refused)} not read" if refused else ""
        click.echo(f"{output}: {len(names)} embeddings of {dim} numbers from {model}{left_out}")
    return 0


def _places(found: Sequence[Found]) -> dict[str, np.ndarray]:
    """Scores (N,), boxes (N,4) and landmarks (N,5,2), float32, in pixels of the upright photo."""
    import numpy as np

    return {
        "scores": np.array([each.score for each in found], np.float32),
        "boxes": np.array([each.box for each in found], np.float32),
        "landmarks": np.array([each.landmarks for each in found], np.float32),
    }
