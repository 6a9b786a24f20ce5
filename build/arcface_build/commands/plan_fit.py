"""`arcface plan fit` says how many instances of a plan, with which largest batch, a card has memory for."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from arcface_build.commands.options.output import hand_over, json_option
from arcface_build.commands.options.plans import megabytes, place_options

if TYPE_CHECKING:
    from arcface_build.plans.places import Places
    from arcface_clients.plans.manifest import PlanManifest

EPILOG = """\b
Examples:
  arcface plan fit r50-fp16-sm86.plan                  on this host's GPU, or on the card that it was built on
  arcface plan fit 9363ac3dd29e --memory 8GB
  arcface plan fit r50-fp16-sm86.plan --instances 4    exit code 3 if they do not fit
"""


@click.command(epilog=EPILOG)
@click.argument("plan", metavar="FILE_OR_KEY")
@click.option("--memory", help="Free memory of the card: 8GB.  [default: this host's GPU, else the builder's]")
@click.option("--reserve", default="1GB", show_default=True, help="Keep free for CUDA itself and other work.")
@click.option("--instances", type=click.IntRange(1), help="Refuse if so many do not fit.  [default: 2 if they fit]")
@place_options
@json_option
def fit(places: Places, plan: str, memory: str | None, reserve: str, instances: int | None, as_json: bool) -> None:
    """Say how many instances of a plan fit on a card, and with which largest batch.

    From the memory that the build measured: weights, and scratch memory of each profile. A smaller largest batch than
    the plan's is an estimate, because scratch memory grows with the batch.
    """
    from arcface_build.plans.memory import PlanMemory, advise
    from arcface_build.plans.places import plan_by_name
    from arcface_clients.plans.spec import parse_bytes

    manifest, _, _ = plan_by_name(places, plan)
    free_bytes, card = (parse_bytes(memory), "as given") if memory else _card(manifest)
    takes = PlanMemory.of(manifest)
    advice = advise(takes, free_bytes, instances, parse_bytes(reserve))

    def told() -> str:
        lines = [
            f"{manifest.spec.file_name}: {advice.instances} × max batch {advice.max_batch}, "
            f"{megabytes(advice.instance_bytes)} each, in {megabytes(advice.room_bytes)} ({card}, less {reserve})",
            f"instance_group [ {{ count: {advice.instances} kind: KIND_AUTO }} ]",
        ]
        if advice.rebuilt:
            lines += [
                f"Max batch {takes.max_batch} does not fit. An estimate for a smaller plan: "
                f"arcface plan build {manifest.spec.model} --max-batch {advice.max_batch}"
            ]
        return "\n".join(lines)

    result = {**asdict(advice), "free_bytes": free_bytes, "card": card, "plan": asdict(takes)}
    hand_over(result, told, as_json)


def _card(manifest: PlanManifest) -> tuple[int, str]:
    """Free memory of this host's first GPU, else the whole memory of the one that the plan was built on."""
    from arcface_build.plans.gpu import find_gpus
    from arcface_clients.errors import Missing

    try:
        gpu = find_gpus()[0]
    except Missing as exc:
        total = int(manifest.gpu.get("memory_bytes") or 0)
        if not total:
            raise Missing(f"no card is named: {exc} Name its memory: --memory 8GB") from exc
        return total, f"the {manifest.gpu.get('name')} that it was built on"
    return gpu.memory_bytes - gpu.memory_used_bytes, f"free on this {gpu.name}"
