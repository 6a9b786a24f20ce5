"""`scripts/consensus-demo`: measures how well and how fast strangers among people's faces are found."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build.commands.options.output import hand_over, json_option, report_option
from arcface_clients.engines.protocol import EmbeddingEngine

EPILOG = """\b
Examples:
  scripts/consensus-demo people/ --model r50
  scripts/consensus-demo people/ --url localhost:8001 --images photos/ --report consensus-demo.json
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER_OF_PERSONS")
@click.option("--url", help="Embed through this server; default: in this process.")
@click.option("--model", help="Model under --models-dir (or served); default: the only one.")
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"))
@click.option("--images", type=click.Path(path_type=Path, exists=True, file_okay=False), help="The people's photos.")
@click.option("--detector", type=click.Path(path_type=Path, dir_okay=False), help="YuNet's ONNX, for --images.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="How often new strangers are drawn.")
@click.option("--seed", type=int, default=0)
@json_option
@report_option
def command(
    folder: Path,
    url: str | None,
    model: str | None,
    models_dir: Path,
    images: Path | None,
    detector: Path | None,
    rounds: int,
    seed: int,
    as_json: bool,
    report: Path | None,
) -> None:
    """Mix strangers into each person's faces and count who is found; measure extraction, cache, distances, pairs."""
    from arcface_tools.consensus import run

    lines: list[str] = []
    with _engine(url, model, models_dir) as engine:
        result = run(folder, engine, images, detector, rounds, seed, say=lines.append)
    hand_over(result, lambda: "\n".join(lines), as_json, report)


def _engine(url: str | None, model: str | None, models_dir: Path) -> EmbeddingEngine:
    from arcface_clients.engines.registry import EngineRegistry

    if url:
        return EngineRegistry.get("triton", url=url, model=model or "arcface")
    return EngineRegistry.get("onnx", models_dir=models_dir, model=model)
