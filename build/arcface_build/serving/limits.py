"""What a tritonserver needs of this host, looked at before a start: /dev/shm, open files, memory."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from arcface_build.errors import ServerFailed
from arcface_build.host_memory import RESERVED, own_limit

# A stub starts with 1 MB and grows: a batch of 64 faces is 2.4 MB, once for each of the two models that may hold one.
NEEDED_BYTES = 16 << 20
FILES_WANTED = 1024  # a connection takes one, and a server with models about fifty
_MORE = "docker run --shm-size=1g (compose: shm_size; Kubernetes: an emptyDir of medium Memory on /dev/shm)"


def need_shared_memory(folder: Path = Path("/dev/shm")) -> None:
    """Refuse a host on which the Python backends could not exchange faces with Triton.

    Raises:
        ServerFailed: the folder is not there, may not be written, or is too full.
    """
    why = ""
    if not folder.is_dir():
        why = f"there is no {folder}"
    elif not os.access(folder, os.W_OK):
        why = f"{folder} may not be written"
    elif (free := shutil.disk_usage(folder).free) < NEEDED_BYTES:
        why = f"{folder} has {free / 2**20:.1f} MB free; expected {NEEDED_BYTES >> 20} MB or more"
    if why:
        raise ServerFailed(
            f"{why}, and Triton's Python backends pass faces through it. Remove what fills it, or give it room: {_MORE}"
        )


def few_open_files(wanted: int = FILES_WANTED) -> str:
    """A sentence where the limit of open files is low even after it was raised as far as it may be; empty if not."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return ""
    return (
        f"this session may open {hard} files, and each connection takes one: more clients than that are not answered. "
        f"Next: ulimit -n {wanted} (as an administrator), or LimitNOFILE= of the service"
    )


def little_memory() -> str:
    """A sentence where this session's own limit (`ulimit -d`) leaves a server less than it needs; empty if not."""
    had = own_limit()
    if had is None or had >= RESERVED:
        return ""
    return (
        f"each process of the server may take {had / 2**30:.1f} GB (ulimit -d): expected {RESERVED >> 30} GB "
        "or more, else it may end without a word. Next: ulimit -d unlimited"
    )
