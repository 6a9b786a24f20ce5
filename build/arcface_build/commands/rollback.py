"""`arcface rollback`: the newest version of a model out of model_repository/, the one before is served again."""

from __future__ import annotations

import json
from pathlib import Path

import click

EPILOG = """\b
Examples:
  arcface rollback                         arcface_onnx and its reference
  arcface rollback --model arcface_trt     the plans
To serve InsightFace itself instead: arcface serve --backend reference
"""


@click.command(epilog=EPILOG)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(["arcface_onnx", "arcface_reference", "arcface_trt"]),
    help="Repeatable; default: arcface_onnx, and arcface_reference where it stands for another source then.",
)
@click.option("--model-repository", type=click.Path(path_type=Path), help="Default: model_repository/ here or above.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def command(models: tuple[str, ...], model_repository: Path | None, as_json: bool) -> None:
    """Remove the newest version of a model; Triton serves the one before when it is started again."""
    from arcface_build.repository.versions import find_repository, roll_back, served_manifest

    repository = find_repository(model_repository)
    done = {model: roll_back(repository, model) for model in models or ("arcface_onnx",)}
    if not models:
        serving, reference = (served_manifest(repository, m) for m in ("arcface_onnx", "arcface_reference"))
        if serving and reference and serving["contract_id"] != reference["contract_id"]:
            done["arcface_reference"] = roll_back(repository, "arcface_reference")
    if as_json:
        click.echo(json.dumps({model: {"removed": old, "serves": new} for model, (old, new) in done.items()}))
        return
    for model, (old, new) in done.items():
        manifest = served_manifest(repository, model) or {}
        what = f"{manifest.get('name')} {manifest.get('precision', 'fp32')}"
        click.echo(f"{model}: version {old} removed, version {new} is served ({what})")
