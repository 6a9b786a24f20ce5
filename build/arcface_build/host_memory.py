"""How much memory this host has, or its control group (a container), and what a server's processes may take of it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

SERVER_SHARE = 0.5  # a server of ours has 0.6 GB of its own, each of its Python models about 1 GB
SERVER_FLOOR = 8 << 30  # a ResNet100 in Winograd's form asks for 7 GB while it loads, and fills 5
SMALL_SHARE = 0.75  # of a host or container so small that the floor would be most of it
RESERVED = 4 << 30  # with models for photos a tritonserver asks for 2.9 GB, stacks of its threads, and fills 0.06


def usable_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes: the least of the host's memory and the limits of this process's control groups, version 1 or 2."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        lines = []
    return min([physical, *(limit for line in lines for limit in _limits(line, cgroups))])


def own_limit() -> int | None:
    """Bytes that this session may ask for (`ulimit -d`); None where it has no such limit."""
    had = [limit for limit in resource.getrlimit(resource.RLIMIT_DATA) if limit != resource.RLIM_INFINITY]
    return min(had) if had else None


def server_memory_limit() -> int:
    """Bytes of its own that the model in a process of a server may ask for."""
    usable, own = usable_memory(), own_limit()
    share = max(min(SERVER_FLOOR, int(usable * SMALL_SHARE)), int(usable * SERVER_SHARE))
    return share if own is None else min(share, own)


def launch_limit() -> int:
    """Bytes (RLIMIT_DATA) that each process of a server may ask for: more than there is, where there is little.

    Triton 2.51 takes what a body over HTTP says that it holds: 80 TB for a shape of 2^31 faces. jemalloc asks for it
    as memory that the kernel need not have (MAP_NORESERVE): without a limit such a server fills the host.
    """
    limit, own = max(server_memory_limit(), RESERVED), own_limit()
    return limit if own is None else min(limit, own)


def processes_killed(vmstat: Path = Path("/proc/vmstat")) -> int:
    """How many processes of this host the kernel has killed for want of memory, a container's among them."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _limits(line: str, cgroups: Path) -> Iterator[int]:
    """The limits of one line of /proc/self/cgroup, NUMBER:CONTROLLERS:PATH, and of the groups around that one.

    Within a container PATH may be that of its host, of which only the container's own group is there: the topmost.
    """
    _, controllers, path = line.split(":", 2)
    if not controllers:
        top, name = cgroups, "memory.max"
    elif "memory" in controllers.split(","):
        top, name = cgroups / "memory", "memory.limit_in_bytes"
    else:
        return
    group = top / path.lstrip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(top):
            try:
                yield int((folder / name).read_text())
            except (OSError, ValueError):  # no such group here; or "max": it has no limit
                continue
