"""Which process of this host listens on a port, and which Python backends it has started, from /proc."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def pid_listening_on(port: int) -> int | None:
    """The process of this host that listens on a TCP port, or None (not here, or not ours to see)."""
    inodes = {
        fields[9]
        for table in ("tcp", "tcp6")
        if (_PROC / "net" / table).exists()
        for line in (_PROC / "net" / table).read_text().splitlines()[1:]
        if (fields := line.split())[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port
    }
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in _PROC.iterdir() if wanted else ():
        if not process.name.isdigit():
            continue
        try:
            if any(str(handle.readlink()) in wanted for handle in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return None


def python_models_of(server: int) -> dict[str, float]:
    """Model → how long the newest process of a Python backend behind it has run, in seconds.

    Args:
        server: process id of tritonserver; its stubs are in its process group.
    """
    started: dict[str, float] = {}
    booted_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            line = (process / "cmdline").read_bytes().split(b"\0")
            if b"triton_python_backend_stub" not in line[0] or os.getpgid(int(process.name)) != os.getpgid(server):
                continue
            since = int((process / "stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            model = Path(os.fsdecode(line[1])).parent.parent.name
            started[model] = min(started.get(model, float("inf")), booted_s - since)
    return started
