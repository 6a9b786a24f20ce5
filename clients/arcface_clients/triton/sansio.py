"""A generator of steps in, its result out: the steps done on a transport, plain or asyncio.

A step is a tuple (transport method, arguments…); its result, or what it raised, goes back into the generator. So an
exchange of several steps is written once, without I/O, and serves both kinds of client (httpx does its
authentication so).
"""

from __future__ import annotations

import random
from collections.abc import Generator
from inspect import isawaitable
from typing import Any, TypeVar

from arcface_clients.triton.transports import Transport

T = TypeVar("T")
Steps = Generator[tuple[Any, ...], Any, T]


def run(steps: Steps[T], transport: Transport) -> T:
    """Do the steps on a transport; what a step raises is raised inside the generator."""
    act, argument = steps.send, None
    while True:
        try:
            step = act(argument)
        except StopIteration as done:
            return done.value
        try:
            argument = getattr(transport, step[0])(*step[1:])
            act = steps.send
        except BaseException as exc:
            act, argument = steps.throw, exc


async def arun(steps: Steps[T], transport: Any) -> T:
    """`run`, awaited; a cancellation is raised inside the generator as well."""
    act, argument = steps.send, None
    while True:
        try:
            step = act(argument)
        except StopIteration as done:
            return done.value
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
