"""CPU time from /proc: of a process tree, of the host, and of other processes while a sample was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass
class CpuUse:
    """Result of `watch_cpu`, in seconds. `foreign_share`: share of all cores used by others or stolen, 0..1."""

    wall_s: float = 0.0
    this_process_s: float = 0.0
    servers_s: float = 0.0
    foreign_share: float = 0.0


def tree_cpu_s(*pids: int) -> float:
    """User and system seconds of processes, their living descendants and reaped children."""
    return sum(tree_cpu_by_pid(*pids).values())


def tree_cpu_by_pid(*pids: int) -> dict[int, float]:
    """User and system seconds of each of these processes and of their living descendants, with reaped children."""
    stats = dict(_all_stats())
    children: dict[int, list[int]] = {}
    for child, (parent, _) in stats.items():
        children.setdefault(parent, []).append(child)
    seen: set[int] = set()
    todo = list(pids)
    while todo:
        current = todo.pop()
        if current in stats and current not in seen:
            seen.add(current)
            todo += children.get(current, [])
    return {pid: stats[pid][1] for pid in seen}


def host_busy_cpu_s() -> float:
    """Busy seconds of all cores since boot, including stolen time."""
    fields = [int(v) for v in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) * _TICK_S


@contextmanager
def watch_cpu(*server_pids: int) -> Iterator[CpuUse]:
    """Fill a CpuUse on exit: this process tree and those of `server_pids` are ours, the rest is foreign."""
    use = CpuUse()
    started, busy, ours = time.perf_counter(), host_busy_cpu_s(), tree_cpu_s(os.getpid(), *server_pids)
    mine, servers = time.process_time(), tree_cpu_s(*server_pids)
    yield use
    use.wall_s = time.perf_counter() - started
    use.this_process_s = time.process_time() - mine
    use.servers_s = tree_cpu_s(*server_pids) - servers
    foreign_s = host_busy_cpu_s() - busy - (tree_cpu_s(os.getpid(), *server_pids) - ours)
    use.foreign_share = max(0.0, foreign_s / (use.wall_s * (os.cpu_count() or 1)))


def _all_stats() -> Iterator[tuple[int, tuple[int, float]]]:
    """(pid, (parent, CPU seconds)) of each living process."""
    for process in _PROC.iterdir():
        if process.name.isdigit():
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            # proc(5), counted from the third field: 4 ppid, 14 utime, 15 stime, 16 cutime, 17 cstime
            yield int(process.name), (int(fields[1]), sum(int(v) for v in fields[11:15]) * _TICK_S)
