"""Which process of this host listens on a port, from /proc."""

from __future__ import annotations

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
