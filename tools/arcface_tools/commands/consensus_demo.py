"""`scripts/consensus-demo`: folders of people and a model in, the figures of `bench.consensus` out."""

from __future__ import annotations

import json
from pathlib import Path

import click

from arcface_clients.engines.protocol import EmbeddingEngine

EPILOG = """\b
Examples:
  scripts/consensus-demo people/ --model r50
  scripts/consensus-demo people/ --url localhost:8001 --images photos/ -o consensus-demo.json
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER_OF_PERSONS")
@click.option("--url", help="Embed through this server; without, in this process.")
@click.option("--model", help="Model under --models-dir (or served); the only one there by default.")
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"))
@click.option("--images", type=click.Path(path_type=Path, exists=True, file_okay=False), help="The people's photos.")
@click.option("--detector", type=click.Path(path_type=Path, dir_okay=False), help="YuNet's ONNX, for --images.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Times that strangers are drawn anew.")
@click.option("--seed", type=int, default=0)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON only.")
def command(
    folder: Path,
    url: str | None,
    model: str | None,
    models_dir: Path,
    images: Path | None,
    detector: Path | None,
    rounds: int,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> int:
    """Put strangers among each person's faces and count who is found; measure extraction, cache, distances, pairs."""
    from arcface_clients.atomic import write_json
    from arcface_tools.consensus import run

    with _engine(url, model, models_dir) as engine:
        report = run(folder, engine, images, detector, rounds, seed, say=(lambda line: None) if as_json else click.echo)
    if output:
        write_json(output, report)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    return 0


def _engine(url: str | None, model: str | None, models_dir: Path) -> EmbeddingEngine:
    from arcface_clients.engines.registry import EngineRegistry

    if url:
        return EngineRegistry.get("triton", url=url, model=model or "arcface")
    return EngineRegistry.get("onnx", models_dir=models_dir, model=model)
