"""`arcface assemble`: an imported model, its best variant, or plans, into model_repository/ as a new version."""

from __future__ import annotations

import json
from pathlib import Path

import click

EPILOG = """\b
Examples:
  arcface assemble r50                         the fp32 serving ONNX, and the reference beside it
  arcface assemble r50 --variant auto          the fastest variant that passed its gate on this CPU
  arcface assemble r50 --plan r50-fp16-sm86.plan --plan r50-fp16-sm89.plan
  arcface rollback                             back to what was there before
"""


@click.command(epilog=EPILOG)
@click.argument("name")
@click.option("--variant", type=click.Choice(["fp32", "auto"]), default="fp32", show_default=True)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A plan, its manifest beside it; repeatable.",
)
@click.option("--models-dir", type=click.Path(path_type=Path), default=Path("models"), show_default=True)
@click.option("--model-repository", type=click.Path(path_type=Path), help="Default: model_repository/ here or above.")
@click.option("--json", "as_json", is_flag=True, help="Print what was installed as JSON.")
def command(
    name: str,
    variant: str,
    plans: tuple[Path, ...],
    models_dir: Path,
    model_repository: Path | None,
    as_json: bool,
) -> None:
    """Install NAME (a folder under models/) into the model repository; nothing that failed its gate gets in.

    A running server takes the new version after `arcface serve` is started again, or on Triton's load request.
    """
    from arcface_build.repository.assemble import assemble, assemble_plans
    from arcface_build.repository.versions import find_repository
    from arcface_clients.config.sources import load_config

    repository, settings = find_repository(model_repository), load_config()
    keep, limits = settings.versions_kept, settings.comparison.max_drift.model_dump()
    model_dir, reason = models_dir / name, None
    if plans:
        installed = {"arcface_trt": assemble_plans(model_dir, plans, repository, keep, limits)}
    else:
        choice = None
        if variant == "auto":
            from arcface_build.variants.choose import choose

            choice = choose(model_dir, limits)
            reason = choice.reason
        installed = assemble(model_dir, repository, choice, keep, limits)
    if as_json:
        click.echo(json.dumps({"installed": installed, "reason": reason}))
        return
    for model, version in installed.items():
        click.echo(f"{model}: version {version} is {name}")
    if reason:
        click.echo(f"because: {reason}")
