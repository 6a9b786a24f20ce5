"""Which of several measured candidates is served: a pure rule over their speeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from arcface_build.variants.candidates import PRECISIONS
from arcface_build.variants.speeds import Goal, Speed
from arcface_clients.engines.runtimes import RUNTIMES

NOISE = 1.03  # on a shared machine a smaller lead is none
LED_ROUNDS = 0.75  # nor is one that fewer than three of four rounds saw


def fastest(speeds: Sequence[Speed], goal: Goal) -> tuple[Speed, Speed | None]:
    """The fastest for the goal; where it does not clearly outrun a more exact one, the most exact of those.

    Args:
        speeds: one or more, measured in the same rounds. More exact is fp32, then bf16, then int8; of one precision,
            the plain form before Winograd's; then what runs in ONNX Runtime's own kernels, then what OpenVINO computes
            in fp32, then in bf16.
        goal: what counts.

    Returns:
        What to serve, and the fastest of the others (None if there is none).
    """
    ranked = sorted(speeds, key=lambda speed: -median(speed.rounds(goal)))
    level = [speed for speed in ranked if not outruns(ranked[0], speed, goal)]
    chosen = min(level, key=_exactness)
    return chosen, next((speed for speed in ranked if speed is not chosen), None)


def _exactness(speed: Speed) -> tuple[int, str, int]:
    return PRECISIONS.index(speed.precision), speed.form, RUNTIMES.index(speed.runtime)


def outruns(one: Speed, other: Speed, goal: Goal) -> bool:
    """Whether `one` is faster than `other` by more than noise."""
    leads = _leads(one, other, goal)
    return median(leads) > NOISE and sum(times > 1 for times in leads) >= LED_ROUNDS * len(leads)


def lead(one: Speed, other: Speed, goal: Goal) -> float:
    """How many times as fast `one` is as `other`, in the median of the rounds."""
    return median(_leads(one, other, goal))


def _leads(one: Speed, other: Speed, goal: Goal) -> list[float]:
    """Ratios within each round: what disturbs a machine for seconds hits both."""
    return [mine / theirs for mine, theirs in zip(one.rounds(goal), other.rounds(goal), strict=True)]
