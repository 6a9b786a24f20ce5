"""How long a test waits for something: until it counts as stuck, or for as long as the promise says."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_S = 600.0  # only a hang takes so long, on the slowest and busiest host


def wait_until(done: Callable[[], object], what: str, timeout_s: float = HANG_S) -> None:
    """Look every 10 ms; raises AssertionError with `what` where it is not done in time."""
    until = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until, what
        time.sleep(0.01)
