"""Gives tritonserver jemalloc where this host has it: glibc keeps most of what a burst of requests took.

Its Python models get it too. It zeroes large memory (calloc, `np.zeros`) with fresh pages from the kernel, whatever its
decay settings: what runs a thousand times a second should take memory that it fills itself (`np.empty`).
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes.util import find_library

PRELOAD = "LD_PRELOAD"


def with_jemalloc(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with jemalloc preloaded; as it was where the host has none, or LD_PRELOAD is set (even to "")."""
    library = None if PRELOAD in environment else find_library("jemalloc")
    return {**environment, **({PRELOAD: library} if library else {})}
