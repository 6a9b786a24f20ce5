"""Runs an exchange that was written once, without I/O, on a plain or an asyncio transport.

An exchange is a generator of steps. A step is a tuple (name of a transport method, its arguments…), and what the method
returns or raises comes back as the value of the `yield`. Everything that takes several requests (connecting, retrying,
shared memory) is written so, and serves both embedders; httpx does its authentication the same way.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from inspect import isawaitable
from typing import Any, TypeVar

from arcface_clients.errors import DeadlineExceeded
from arcface_clients.triton.transports import AsyncTransport, Transport

CONTROL_TIMEOUT_S = 10.0  # for everything that is asked of a server but inference
_CLOCK_S = 0.05  # by so much a driver's clock may run ahead of ours
_WITHOUT_LIMIT = ("pack",)
T = TypeVar("T")
Steps = Generator[tuple[Any, ...], Any, T]


def run(steps: Steps[T], transport: Transport) -> T:
    """Do each step on a transport; what a step raises is raised at its `yield`."""
    act, argument = steps.send, None
    while True:
        try:
            step = act(argument)
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            argument = getattr(transport, step[0])(*step[1:])
            act = steps.send
        except BaseException as exc:
            act, argument = steps.throw, exc


async def arun(steps: Steps[T], transport: AsyncTransport) -> T:
    """`run` on an asyncio transport; a cancellation is raised at the `yield` as well."""
    act, argument = steps.send, None
    while True:
        try:
            step = act(argument)
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            argument = getattr(transport, step[0])(*step[1:])
            if isawaitable(argument):
                argument = await argument
            act = steps.send
        except BaseException as exc:
            act, argument = steps.throw, exc


def within(steps: Steps[T], deadline_s: float, late: Callable[[], Exception]) -> Steps[T]:
    """The same exchange, each step cut to what is left until `deadline_s` (monotonic).

    Args:
        steps: their last argument is the step's own limit in seconds, but for those of `_WITHOUT_LIMIT`.
        deadline_s: when all of it has to be done.
        late: makes the error that is raised at the `yield` when nothing is left, or a cut step came too late.
    """
    act, argument = steps.send, None
    while True:
        try:
            step = act(argument)
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            if step[0] not in _WITHOUT_LIMIT:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise late()
                step = (*step[:-1], min(step[-1], left_s))
            argument = yield step
            act = steps.send
        except DeadlineExceeded as exc:
            act, argument = steps.throw, exc if time.monotonic() < deadline_s - _CLOCK_S else late()
        except BaseException as exc:
            act, argument = steps.throw, exc


def backoff_s(attempt: int, base_s: float = 0.1, cap_s: float = 2.0) -> float:
    """Wait before attempt `attempt` + 1: uniform in (0, min(cap, base · 2^attempt)).

    "Full jitter" (AWS Architecture Blog, Exponential Backoff And Jitter): clients that lost one server do not come
    back in step.
    """
    return random.uniform(0, min(cap_s, base_s * 2 ** min(attempt, 16)))
