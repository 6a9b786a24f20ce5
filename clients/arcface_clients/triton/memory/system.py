"""System shared memory: faces are written where a server on this host reads them, and embeddings read where it wrote.

A region is a file in /dev/shm whose owner holds a lock on it as long as it lives. So what a dead process left behind
is told from what is in use without process ids, which mean nothing across containers. A region on a GPU
(`memory.cuda`) has such a file too, an empty one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_BYTES, FACE_SHAPE
from arcface_clients.triton.memory.choice import Kind

FOLDER = Path("/dev/shm")
PREFIX = "arcface-"
CUDA_PREFIX = f"{PREFIX}cuda-"
# A server may still work on a request of a process that died, and must not be robbed of the memory under it.
GRACE_S = 120.0
_ALIGNMENT = 4096


class Slot:
    """One region with room for the faces and the embeddings of one request: created, locked, filled with zeros.

    Raises:
        OSError: no /dev/shm, no permission, or not enough room in it.
    """

    memory: Kind = "system"
    device: int | None = None  # the GPU that holds it

    def __init__(self, max_faces: int, embedding_dim: int) -> None:
        """Reserve the memory now: a file that outgrows /dev/shm later would end the process with SIGBUS."""
        self.name = self._new_name()
        self.max_faces = max_faces
        self.embedding_dim = embedding_dim
        self.doubtful = False  # the server may still read or write it: never to be used again
        self.registered_with: object = None  # the server's life (Session) that knows this region
        self._rows_offset = -(-max_faces * FACE_BYTES // _ALIGNMENT) * _ALIGNMENT
        self.byte_size = self._rows_offset + max_faces * embedding_dim * 4
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._reserve()
        except OSError:
            os.close(self._file)
            self.path.unlink()
            raise

    def _new_name(self) -> str:
        return f"{PREFIX}{secrets.token_hex(12)}"

    def _reserve(self) -> None:
        os.posix_fallocate(self._file, 0, self.byte_size)
        memory = mmap.mmap(self._file, self.byte_size)
        self._faces = np.frombuffer(memory, np.uint8, self.max_faces * FACE_BYTES).reshape(self.max_faces, *FACE_SHAPE)
        rows = np.frombuffer(memory, np.float32, self.max_faces * self.embedding_dim, self._rows_offset)
        self._rows = rows.reshape(self.max_faces, self.embedding_dim)

    @property
    def path(self) -> Path:
        """The file in /dev/shm."""
        return FOLDER / self.name

    @property
    def key(self) -> str:
        """The name for shm_open, as the server is told."""
        return f"/{self.name}"

    def faces_at(self, count: int) -> tuple[int, int]:
        """Offset and length in bytes of the first `count` faces."""
        return 0, count * FACE_BYTES

    def rows_at(self, count: int) -> tuple[int, int]:
        """Offset and length in bytes of the first `count` embeddings."""
        return self._rows_offset, count * self.embedding_dim * 4

    def put(self, parts: Sequence[Any]) -> None:
        """Copy faces uint8 (n_i,112,112,3) in, one part after the other."""
        start = 0
        for part in parts:
            np.copyto(self._faces[start : start + len(part)], part)
            start += len(part)
        self._rows[:start] = np.nan  # an answer that never arrived must not look like one
        os.utime(self._file)  # writes through a mapping leave the time alone; `stale` wants to know the last use

    def faces(self, count: int) -> Array:
        """The first `count` faces, a view."""
        return self._faces[:count]

    def rows(self, count: int) -> Array:
        """The first `count` embeddings, a copy."""
        return self._rows[:count].copy()

    def close(self) -> None:
        """Unlink the file and let go of it; the server's mapping, if any, stays valid until it unregisters."""
        if self._file >= 0:
            if not self.doubtful:
                self.path.unlink(missing_ok=True)
            file, self._file = self._file, -1
            fcntl.flock(file, fcntl.LOCK_UN)  # the mapping would keep it: a doubtful file is left for `stale`
            os.close(file)


def stale(name: str, now_s: float | None = None) -> bool:
    """Whether a region of ours has no living owner and was last used longer than the grace time ago.

    A region without a file is stale as well: its owner closed it, and could not tell the server. But the file of a
    region on a GPU may be in the /dev/shm of another container.
    """
    if name.startswith(CUDA_PREFIX) and not name.startswith(own_cuda_prefix()):
        return False
    try:
        file = os.open(FOLDER / name, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # another user's: not ours to judge
    try:
        age_s = (time.time() if now_s is None else now_s) - os.fstat(file).st_mtime
        if age_s < GRACE_S:
            return False
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def unlink(name: str) -> None:
    """Remove a region's file, if it is still there."""
    (FOLDER / name).unlink(missing_ok=True)


def memory_of(name: str) -> Kind:
    """The kind of shared memory that a region of ours with this name is: "system" or "cuda"."""
    return "cuda" if name.startswith(CUDA_PREFIX) else "system"


def own_cuda_prefix() -> str:
    """How names of regions on a GPU begin whose files are in the /dev/shm that this process sees."""
    return f"{CUDA_PREFIX}{FOLDER.stat().st_dev:x}-"


def left_behind() -> list[str]:
    """Names of our regions in /dev/shm, whoever owns them."""
    return sorted(path.name for path in FOLDER.glob(f"{PREFIX}*")) if FOLDER.is_dir() else []


def is_local(host: str) -> bool:
    """Whether a host name means this host: an address that a socket can be bound to is one of ours."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
        except OSError:
            continue
    return False
