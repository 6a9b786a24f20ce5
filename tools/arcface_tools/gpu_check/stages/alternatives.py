"""Stage 6: one thing changed at a time, and the other networks and precisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from arcface_build.repository.profiles import CUDA_GRAPHS
from arcface_tools.gpu_check import artefacts
from arcface_tools.gpu_check.artefacts import Shape
from arcface_tools.gpu_check.check import GpuCheck, Result
from arcface_tools.gpu_check.served import repository_of, served
from arcface_tools.gpu_check.stages.bare import time_plan
from arcface_tools.gpu_check.stages.through_triton import through

TITLE = "Alternatives: forms of the graph, plan sets, CUDA graphs, other precisions and networks"
SERVED: dict[str, Callable[[str], str]] = {
    "CUDA graphs": lambda config: config + CUDA_GRAPHS,
    "one instance": lambda config: config.replace("count: 2", "count: 1"),
}


def shapes(check: GpuCheck) -> list[Shape]:
    """Other forms of the graph, a plan for the batch of the goals alone, and a plan set."""
    usual, goal = artefacts.dynamic(check), check.settings.goal_batches[0]
    small = tuple(batch for batch in check.settings.batches if batch < usual.opt_batch)[:2]
    return [
        replace(usual, name="BatchNormalization not folded into padded convolutions", fold_padded=False),
        replace(usual, name="PReLU as pointwise nodes", prelu="fused"),
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
    for name, change in SERVED.items():
        check.step(f"{first} fp16 through tritonserver, {name}", 30, partial(_served, check, first, change))
    for network in others:
        check.step(f"{network} fp16", 60, partial(time_plan, check, network, "fp16"))


def _served(check: GpuCheck, network: str, change: Callable[[str], str], result: Result) -> None:
    """Over gRPC alone, to compare with stage 5."""
    built = artefacts.plan(check, network, "fp16")
    bare = {row["batch"]: row["faces_per_s"] for row in check.result(2, f"{network} fp16").get("rows", [])}
    expected = artefacts.reference(check, built.source)
    log = f"tritonserver-{network}-changed.log"
    with served(check, repository_of(check, built, change), ["arcface_trt"], log) as server:
        result["ways"] = {"gRPC": through(check, server.grpc_url, False, expected, bare)}


def _without_graphs(check: GpuCheck, network: str, result: Result) -> None:
    time_plan(check, network, "fp16", result, graph=False)


def _shape(check: GpuCheck, network: str, shape: Shape, result: Result) -> None:
    time_plan(check, network, "fp16", result, shape)
