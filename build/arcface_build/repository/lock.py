"""A lock, so that only one process at a time changes a model repository."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Wait until no other process is changing it; the lock is released when its process ends, however that happens."""
    handle = os.open(repository, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems, such as network mounts, have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
