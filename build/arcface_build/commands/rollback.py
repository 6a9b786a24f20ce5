"""`arcface rollback` removes a model's newest version from model_repository/ and returns to the previous one."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, repository_at
from arcface_build.commands.options.output import hand_over, json_option

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
    type=click.Choice(["arcface_onnx", "arcface_reference", "arcface_trt", "photo_faces"]),
    help="Repeatable; default: arcface_onnx, and arcface_reference if its source would no longer match.",
)
@model_repository_option
@json_option
def command(models: tuple[str, ...], model_repository: Path | None, as_json: bool) -> None:
    """Remove the newest version of a model; Triton serves the previous one after a restart."""
    from arcface_build.repository.install import roll_back_served
    from arcface_build.repository.versions import served_manifest
    from arcface_build.serving.change_over import ChangeOver

    repository = repository_at(model_repository)
    change = ChangeOver(repository)
    done = roll_back_served(repository, models)

    def told() -> str:
        lines = []
        for model, (old, new) in done.items():
            manifest = served_manifest(repository, model) or {}
            precision = manifest.get("precision", "fp32" if "contract_id" in manifest else "")  # a detector has none
            what = f"{manifest.get('name')} {precision}".rstrip()
            lines.append(f"{model}: version {old} removed, version {new} is served ({what})")
        return "\n".join(lines)

    hand_over({model: {"removed": old, "serves": new} for model, (old, new) in done.items()}, told, as_json)
    if still := change.told():
        terminal.complaint(still)
