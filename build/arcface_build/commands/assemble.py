"""`arcface assemble` installs an imported model, its best variant, or plans in model_repository/ as a new version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from arcface_build import terminal
from arcface_build.commands.options.folders import model_repository_option, models_dir_option, repository_at
from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.settings import settings

if TYPE_CHECKING:
    from arcface_clients.config.schema import EmbeddingConfig

EPILOG = """\b
Examples:
  arcface assemble r50                         the fp32 serving ONNX, and its reference
  arcface assemble r50 --variant auto          the fastest that passed its gate, measured on this CPU
  arcface assemble r50 --variant int8          int8, whatever its speed here; arcface serve leaves it so
  arcface assemble r50 --plan r50-fp16-sm86.plan --plan r50-fp16-sm89.plan
  arcface plan pull --sm auto && arcface assemble r50 --plan auto     what the store has for this GPU
  arcface rollback                             back to the previous version
"""


@click.command(epilog=EPILOG)
@click.argument("name")
@click.option(
    "--variant",
    type=click.Choice(["fp32", "bf16", "int8", "auto"]),
    help="A precision is what arcface serve then leaves as it is; auto: the fastest here. Without it: fp32, in whose "
    "place arcface serve may put a faster one.",
)
@click.option("--remeasure", is_flag=True, help="With --variant auto: do not believe what was measured earlier.")
@click.option(
    "--plan",
    "plans",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A plan with its manifest beside it; repeatable. auto: the newest for this GPU in the cache.",
)
@click.option("--cuda-graphs", is_flag=True, help="With --plan: replay CUDA graphs, which Triton captures at start.")
@models_dir_option
@model_repository_option
@json_option
def command(
    name: str,
    variant: str | None,
    remeasure: bool,
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
    from arcface_build.repository.integrity import BY_ASSEMBLE
    from arcface_build.serving.change_over import ChangeOver
    from arcface_build.serving.server_runtimes import runtimes_of_host
    from arcface_build.variants.choose import Wanted, choose
    from arcface_clients.engines.import_manifest import model_at

    model_dir, choice, config = model_at(models_dir, name), None, settings()
    repository = repository_at(model_repository, make=model_dir.is_dir())
    keep, limits = config.versions_kept, config.comparison.max_drift.model_dump()
    change = ChangeOver(repository)
    held = {None: None, "auto": ""}.get(variant, BY_ASSEMBLE)
    if plans and variant:
        raise click.UsageError("--variant is for arcface_onnx, --plan for arcface_trt: give one of them")
    if plans:
        key = config.storage.public_key
        if plans == (Path("auto"),):
            plans = (_plan_for_this_gpu(name, config),)
        installed = {"arcface_trt": assemble_plans(model_dir, plans, repository, keep, limits, key, cuda_graphs)}
    elif cuda_graphs:
        raise click.UsageError("--cuda-graphs is for plans: add --plan FILE")
    else:
        if variant is not None:
            server = runtimes_of_host(terminal.complaint)
            wanted = Wanted(config.goal, None if variant == "auto" else variant, remeasure)
            choice = choose(model_dir, limits, server.here, server.told_precision, wanted, terminal.notice)
        installed = assemble(model_dir, repository, choice, keep, limits, held)
    reason = choice.reason if choice else None
    lines = [f"{model}: version {version} is {name}" for model, version in installed.items()]
    lines += [f"because: {reason}"] if reason else []
    if held:
        lines.append(f"arcface serve leaves it so (the fastest instead: arcface assemble {name} --variant auto)")
    lines += [choice.offer] if choice and choice.offer else []
    told = {"installed": installed, "reason": reason, "measured": choice.measured if choice else None}
    hand_over(told, lambda: "\n".join(lines), as_json)
    if changed := change.told():
        terminal.complaint(changed)


def _plan_for_this_gpu(model: str, config: EmbeddingConfig) -> Path:
    """The newest plan of the configured precision in the cache that this host's GPU and server load.

    Raises:
        Missing: no GPU, or no plan for it.
        PlanRefused: what is there may not be used.
    """
    from arcface_build.plans.gpu import find_gpus
    from arcface_build.serving.served_plans import tensorrt_of_server
    from arcface_clients.plans.find import find_plan

    gpu, storage = find_gpus()[0], config.storage
    return find_plan(
        gpu.sm,
        config.precision,
        model_repository=None,
        cache=storage.plan_folder,
        model=model,
        tensorrt=tensorrt_of_server(),
        public_key=storage.public_key,
        gpu=gpu.name,
    ).path
