"""Runs an exchange that was written once, without I/O, on a plain or an asyncio transport.

An exchange is a generator of steps. A step is a tuple (name of a transport method, its arguments…), and what the method
returns or raises comes back as the value of the `yield`. Everything that takes several requests (connecting, retrying,
shared memory) is written so, and serves both embedders; httpx does its authentication the same way.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from inspect import isawaitable
from typing import Any, TypeVar

from arcface_clients.triton.transports import AsyncTransport, Transport

CONTROL_TIMEOUT_S = 10.0  # for everything that is asked of a server but inference
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


def backoff_s(attempt: int, base_s: float = 0.1, cap_s: float = 2.0) -> float:
    """Wait before attempt `attempt` + 1: uniform in (0, min(cap, base · 2^attempt)).

    "Full jitter" (AWS Architecture Blog, Exponential Backoff And Jitter): clients that lost one server do not come
    back in step.
    """
    return random.uniform(0, min(cap_s, base_s * 2 ** min(attempt, 16)))
