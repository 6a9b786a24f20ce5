"""`arcface assemble` installs an imported model, its best variant, or plans in model_repository/ as a new version."""

from __future__ import annotations

from pathlib import Path

import click

from arcface_build.commands.options.folders import model_repository_option, models_dir_option, repository_at
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.settings import settings

EPILOG = """\b
Examples:
  arcface assemble r50                         the fp32 serving ONNX, and its reference
  arcface assemble r50 --variant auto          the fastest variant that passed its gate on this CPU
  arcface assemble r50 --plan r50-fp16-sm86.plan --plan r50-fp16-sm89.plan
  arcface rollback                             back to the previous version
"""


@click.command(epilog=EPILOG)
@click.argument("name")
@click.option("--variant", type=click.Choice(["fp32", "auto"]), default="fp32", show_default=True)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A plan with its manifest beside it; repeatable.",
)
@click.option("--cuda-graphs", is_flag=True, help="With --plan: replay CUDA graphs, which Triton captures at start.")
@models_dir_option
@model_repository_option
@json_option
def command(
    name: str,
    variant: str,
    plans: tuple[Path, ...],
    cuda_graphs: bool,
    models_dir: Path,
    model_repository: Path | None,
    as_json: bool,
) -> None:
    """Install NAME (a folder under models/) in the model repository; nothing that failed its gate is accepted.

    A running server picks up the new version after a restart of `arcface serve`, or on Triton's load request.
    """
    from arcface_build.repository.assemble import assemble, assemble_plans
    from arcface_build.variants.choose import choose

    repository, config = repository_at(model_repository), settings()
    keep, limits = config.versions_kept, config.comparison.max_drift.model_dump()
    model_dir, choice = models_dir / name, None
    if plans:
        key = config.storage.public_key
        installed = {"arcface_trt": assemble_plans(model_dir, plans, repository, keep, limits, key, cuda_graphs)}
    elif cuda_graphs:
        raise click.UsageError("--cuda-graphs is for plans: add --plan FILE")
    else:
        choice = choose(model_dir, limits) if variant == "auto" else None
        installed = assemble(model_dir, repository, choice, keep, limits)
    reason = choice.reason if choice else None
    lines = [f"{model}: version {version} is {name}" for model, version in installed.items()]
    lines += [f"because: {reason}"] if reason else []
    hand_over({"installed": installed, "reason": reason}, lambda: "\n".join(lines), as_json)
