"""Tidying up a server's regions, as steps: those of clients that died, and our own lost ones after its restart."""

from __future__ import annotations

from arcface_clients.errors import ArcFaceError, ConfigError, InferenceFailed
from arcface_clients.triton.memory.slots import SlotPool
from arcface_clients.triton.memory.system import PREFIX, left_behind, memory_of, stale, unlink
from arcface_clients.triton.sansio import CONTROL_TIMEOUT_S, Steps


def sweep(used: str) -> Steps[None]:
    """Unregister and remove what clients that died have left behind, in the memory used and where files say so."""
    here = left_behind()
    try:
        for memory in {used, *map(memory_of, here)}:
            known = yield "shared_regions", memory, CONTROL_TIMEOUT_S
            for name in {name for name in (*here, *known) if name.startswith(PREFIX)}:
                if memory_of(name) == memory and stale(name):
                    yield "unregister_shared", name, CONTROL_TIMEOUT_S
                    unlink(name)
    except ArcFaceError:
        return  # a courtesy


def forget_lost(pool: SlotPool) -> Steps[None]:
    """Let go of the doubtful slots that the server does not know (any more)."""
    known: list[str] = []
    try:
        for memory in set(pool.doubtful_memory()):
            known += yield "shared_regions", memory, CONTROL_TIMEOUT_S
    except (InferenceFailed, ConfigError):
        return  # the next client of this server removes them
    pool.forget(known)
