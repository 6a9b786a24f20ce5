"""Gives tritonserver jemalloc where this host has it: glibc keeps much of what a burst of requests took.

jemalloc gives memory back as later calls come by, and a server that nobody asks keeps it; threads of its own
(`background_thread`) give it back within its ten seconds. Python models get it too. It zeroes large memory (calloc,
`np.zeros`) with fresh pages from the kernel, whatever its decay settings: what runs a thousand times a second should
take memory that it fills itself (`np.empty`).
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes.util import find_library

PRELOAD = "LD_PRELOAD"
SETTINGS = {"MALLOC_CONF": "background_thread:true"}


def with_jemalloc(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with jemalloc preloaded; as it was where the host has none, or LD_PRELOAD is set (even to "").

    A MALLOC_CONF of the user's stays as it is.
    """
    library = None if PRELOAD in environment else find_library("jemalloc")
    return {**SETTINGS, **environment, PRELOAD: library} if library else dict(environment)
