"""`arcface embed`: face crops in, an .npz with their embeddings and names out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from arcface_build.atomic import new_file
from arcface_build.errors import WrongUse

EPILOG = """\b
Examples:
  arcface embed crops/ -o embeddings.npz
  arcface embed 'people/*/*.jpg' -o people.npz --url grpc://gpu-host:8001
  arcface embed faces.npz -o embeddings.npz --force
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.argument("sources", nargs=-1, required=True, metavar="FOLDER_OR_FILES...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The .npz to write."
)
@click.option("--url", default="localhost:8001", envvar="ARCFACE_URL", help="Server to ask.")
@click.option("--model", default="arcface", help="Served model.")
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=120.0, help="Longest wait for one request."
)
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    sources: tuple[str, ...], output: Path, url: str, model: str, timeout_s: float, force: bool, as_json: bool
) -> int:
    """Embed face crops (112×112, aligned) from folders, files, globs or .npz through a server.

    What cannot be read is listed with the reason and left out. The .npz holds `paths`, `embeddings` float32 (N,D) of
    unit length, `contract_id` and `model`.
    """
    import json

    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from arcface_clients import TritonEmbedder
    from arcface_clients.images import Crop, find_files, read_crops

    if output.suffix != ".npz":
        raise WrongUse(f"the output is {output.name!r}; expected a name that ends in .npz, such as {output.stem}.npz")
    if output.exists() and not force:
        raise WrongUse(f"{output} is there already. Choose another name, or overwrite it: --force")
    files = find_files(sources)
    errors = Console(stderr=True)
    names: list[str] = []
    refused: list[Crop] = []
    rows: list[np.ndarray] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        TritonEmbedder(url, model, timeout_s=timeout_s) as embedder,
        Progress(*columns, console=errors, disable=not errors.is_terminal) as progress,
    ):
        served = embedder.ensure_ready()
        bar = progress.add_task("files", total=len(files))

        def told() -> Iterator[str]:
            for name in files:
                yield name
                progress.advance(bar)

        for batch in _batches(read_crops(told()), served.max_batch_size * embedder.in_flight, refused):
            rows.append(embedder.encode([crop.face for crop in batch]))
            names.extend(crop.name for crop in batch)
        dim = embedder.embedding_dim
    for crop in refused:
        click.echo(f"not read: {crop.name}: {crop.refused}", err=True)
    if not names:
        raise WrongUse(
            f"no face could be read from {' '.join(sources)} ({len(files)} files found, {len(refused)} refused); "
            "expected aligned 112×112 crops. Nothing was written"
        )
    embeddings = np.concatenate(rows)
    with new_file(output) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            paths=np.array(names),
            embeddings=embeddings,
            contract_id=np.array(served.contract_id or ""),
            model=np.array(model),
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


def _batches(crops: Iterator, size: int, refused: list) -> Iterator[list]:
    """Lists of up to `size` readable crops; the others go to `refused`."""
    batch: list = []
    for crop in crops:
        if crop.face is None:
            refused.append(crop)
            continue
        batch.append(crop)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
