"""Stage 6: one thing changed at a time, and the other networks and precisions."""

from __future__ import annotations

from functools import partial

from arcface_tools.gpu_check import artefacts
from arcface_tools.gpu_check.artefacts import Shape
from arcface_tools.gpu_check.check import GpuCheck, Result
from arcface_tools.gpu_check.stages.bare import time_plan

TITLE = "Alternatives: plan sets, CUDA graphs, other precisions and networks"


def shapes(check: GpuCheck) -> list[Shape]:
    """A plan for the goal's batch alone, and one with kernels of their own for the small batches."""
    usual, goal = artefacts.dynamic(check), check.settings.goal_batches[0]
    small = tuple(batch for batch in check.settings.batches if batch < usual.opt_batch)[:2]
    return [
        Shape(f"static-{goal}", goal, goal, goal),
        Shape("set", usual.min_batch, usual.opt_batch, usual.max_batch, small),
    ]


def measure(check: GpuCheck) -> None:
    """Run the steps."""
    first, *others = (name for name, _ in check.settings.networks)
    check.step(f"{first} fp16, plain launches", 15, partial(_without_graphs, check, first))
    for shape in shapes(check):
        check.step(f"{first} fp16, {shape.name}", 60, partial(_shape, check, first, shape))
    check.step(f"{first} int8", 60, partial(time_plan, check, first, "int8"))
    check.step(f"{first} fp32", 60, partial(time_plan, check, first, "fp32"))
    for network in others:
        check.step(f"{network} fp16", 60, partial(time_plan, check, network, "fp16"))


def _without_graphs(check: GpuCheck, network: str, result: Result) -> None:
    time_plan(check, network, "fp16", result, graph=False)


def _shape(check: GpuCheck, network: str, shape: Shape, result: Result) -> None:
    time_plan(check, network, "fp16", result, shape)
