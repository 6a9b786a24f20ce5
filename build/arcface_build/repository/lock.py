"""One process at a time changes a model repository."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Wait until no other process changes it; the lock goes with its process, however that ends."""
    handle = os.open(repository, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks, such as some network mounts
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
