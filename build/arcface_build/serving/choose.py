"""Which backend `arcface` is served by: a pure rule over what is there, and the reason that is printed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arcface_build.serving.served_plans import ServedPlans
from arcface_clients.errors import Missing, PlanRefused, WrongUse
from arcface_clients.extras import how_to_get

if TYPE_CHECKING:
    from arcface_clients.config.schema import Fallback

LEAF_OF = {"tensorrt": "arcface_trt", "onnx": "arcface_onnx", "reference": "arcface_reference"}


@dataclass(frozen=True)
class BackendChoice:
    """A value for --model-config-name and why it was taken."""

    backend: str
    reason: str


def choose_backend(asked: str, gpu_sm: str | None, plans: ServedPlans, onnx: bool, reference: bool) -> BackendChoice:
    """Pick tensorrt, onnx or reference.

    Args:
        asked: auto, or one of the three.
        gpu_sm: SM of this host's GPU ("8.6"), None where there is none.
        plans: what stands in arcface_trt, read and checked.
        onnx: whether arcface_onnx holds weights.
        reference: whether arcface_reference holds weights and InsightFace is installed.

    Raises:
        Missing: what was asked for is not there, or nothing is.
        PlanRefused: tensorrt was asked for, and the plan for this GPU may not be used.
    """
    there = {"tensorrt": gpu_sm is not None and gpu_sm in plans.good, "onnx": onnx, "reference": reference}
    have = ", ".join(sorted(plans.good, key=float)) or "none"
    why_no_plan = f"no GPU here (plans: {have})" if gpu_sm is None else f"no plan for SM {gpu_sm} (plans: {have})"
    if gpu_sm is not None and gpu_sm in plans.refused:
        why_no_plan = plans.refused[gpu_sm]
        if asked == "tensorrt":
            raise PlanRefused(f"cannot serve tensorrt: {why_no_plan}")
    if asked != "auto":
        if there[asked]:
            return BackendChoice(asked, "asked for")
        reasons = {
            "tensorrt": f"{why_no_plan}. Next: arcface plan build --precision fp16, on such a GPU",
            "onnx": "arcface_onnx has no weights. Next: arcface import demo, or arcface import YOUR.onnx",
            "reference": "arcface_reference has no weights, or insightface is not installed. "
            f"Next: arcface import demo; {how_to_get('insightface')}",
        }
        raise Missing(f"cannot serve {asked}: {reasons[asked]}")
    if there["tensorrt"]:
        return BackendChoice("tensorrt", f"GPU of SM {gpu_sm} and a verified plan for it")
    if there["onnx"]:
        return BackendChoice("onnx", why_no_plan)
    if there["reference"]:
        return BackendChoice("reference", f"{why_no_plan}, and arcface_onnx has no weights")
    raise Missing(
        "no weights in the model repository. Next: arcface import demo (for trying), or arcface import YOUR.onnx"
    )


def refuse_unheeded_precision(variant: str, asked: str, choice: BackendChoice, gpu_sm: str | None) -> None:
    """Refuse a precision that was asked for by name where what is served has its own.

    Args:
        variant: auto, installed, or a precision.
        asked: the backend that was asked for; auto, tuned, or one of the three.
        choice: the backend that is served.
        gpu_sm: SM of this host's GPU, None where there is none.

    Raises:
        WrongUse: it could not be heeded.
    """
    if variant in ("auto", "installed"):
        return
    why = {
        "tensorrt": "a plan has its own precision. Next: arcface assemble NAME --plan FILE, with a plan of that one",
        "reference": "InsightFace computes in fp32. Next: leave --variant out",
    }.get(choice.backend, "")
    if asked == "tuned":
        why = (
            "configs/tuned.pbtxt was measured with the installed weights. "
            f"Next: arcface assemble NAME --variant {variant} && arcface tune"
        )
    elif not why and gpu_sm is not None:
        why = (
            f"variants are for the CPU, and this host has a GPU of SM {gpu_sm}. Next: hide it (CUDA_VISIBLE_DEVICES=), "
            "or leave --variant out"
        )
    if why:
        raise WrongUse(f"--variant {variant} cannot be heeded with backend {choice.backend} ({choice.reason}): {why}")


def order_of_backends(first: str, fallback: Fallback, there: Collection[str]) -> list[str]:
    """What is tried in turn when one does not load or fails its validation.

    Args:
        first: the choice. The reference stands alone: who serves it wants nothing else.
        fallback: fallback.chain follows, where it is enabled.
        there: what can be served besides: onnx with weights, the reference where it is loaded for comparison.
    """
    served_as = {"onnx": "onnx", "insightface": "reference"}
    wanted = [served_as[name] for name in fallback.chain if name in served_as] if fallback.enabled else []
    following = [] if first == "reference" else [name for name in wanted if name in there]
    return list(dict.fromkeys([first, *following]))
