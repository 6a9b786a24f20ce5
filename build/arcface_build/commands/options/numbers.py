"""Number types for options; unlike click's own, they reject nan and inf."""

from __future__ import annotations

import math
from typing import Any

import click


class FiniteNumber(click.FloatRange):
    """A finite float within bounds; click's own ranges accept nan, because it compares false with every bound."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number.

        Raises:
            BadParameter: none, not finite, or outside the bounds.
        """
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


POSITIVE = FiniteNumber(0, min_open=True)
NOT_NEGATIVE = FiniteNumber(0)
SHARE = FiniteNumber(0, 1, min_open=True)
COSINE = FiniteNumber(-1, 1)
DRIFT = FiniteNumber(0, 2)  # 1 − cosine


class BatchSizes(click.ParamType):
    """Different batch sizes, as in "1,8,64"."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The sizes in their order.

        Raises:
            BadParameter: not a list of different whole numbers from 1 on.
        """
        parts = str(value).split(",")
        sizes = tuple(int(part) for part in parts if part.strip().isdecimal())
        if len(sizes) != len(parts) or len(set(sizes)) != len(sizes) or min(sizes) < 1:
            self.fail(f"{value!r} is not a list of different batch sizes such as 1,8,64.", param, ctx)
        return sizes
