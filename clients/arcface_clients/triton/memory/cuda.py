"""CUDA shared memory: a slot on a GPU, which a server on this host opens by its IPC handle.

Its file in /dev/shm is empty and only says whether its owner lives; the name says in which /dev/shm.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_BYTES, FACE_SHAPE
from arcface_clients.faces.check import Faces
from arcface_clients.faces.gpu_arrays import GpuFaces
from arcface_clients.gpu.driver import driver
from arcface_clients.triton.memory.choice import Kind
from arcface_clients.triton.memory.system import Slot, own_cuda_prefix

# Smaller allocations may share a block, which is what a handle opens (CUDA C++ Programming Guide, Interprocess
# Communication): the server would get the block's begin, and our neighbours' data.
BLOCK_BYTES = 2 << 20


class CudaSlot(Slot):
    """One region on a GPU with room for one request; faces on the same GPU are copied into it without the host.

    Raises:
        OSError: as `Slot`; CudaFailed, DependencyMissing (both are OSErrors): no driver, no such GPU, no room on it.
    """

    memory: Kind = "cuda"

    def __init__(self, max_faces: int, embedding_dim: int, device: int) -> None:
        """Allocate now; `device` is the GPU's number in this process."""
        self.device = self._gpu = device
        self.raw_handle = b""  # what the server opens it with
        self._address = 0
        super().__init__(max_faces, embedding_dim)

    def _new_name(self) -> str:
        return f"{own_cuda_prefix()}{secrets.token_hex(12)}"

    def _reserve(self) -> None:
        self._cuda = driver()
        with self._cuda.on(self._gpu):
            self._address = self._cuda.allocate(-(-self.byte_size // BLOCK_BYTES) * BLOCK_BYTES)
            try:
                self.raw_handle = self._cuda.ipc_handle(self._address)
                self._stream = self._cuda.stream()
            except OSError:
                self._cuda.free(self._address)
                raise

    def put(self, parts: Sequence[Faces]) -> None:
        """Copy faces uint8 (n_i,112,112,3) in, one part after the other; those on a GPU are on this one."""
        start, cuda = 0, self._cuda
        with cuda.on(self._gpu):
            for part in parts:
                place = self._address + start * FACE_BYTES
                if isinstance(part, GpuFaces):
                    cuda.copy_within(place, part.address, part.nbytes, self._stream)
                else:
                    cuda.copy_in(place, part.ctypes.data, part.nbytes, self._stream)
                start += len(part)
            offset, length = self.rows_at(start)
            cuda.fill(self._address + offset, 0xFF, length, self._stream)  # NaN, as in Slot.put
            cuda.wait(self._stream)
        os.utime(self._file)

    def faces(self, count: int) -> Array:
        """The first `count` faces, a copy in host memory."""
        return self._copied_out(np.empty((count, *FACE_SHAPE), np.uint8), 0)

    def rows(self, count: int) -> Array:
        """The first `count` embeddings, a copy in host memory."""
        return self._copied_out(np.empty((count, self.embedding_dim), np.float32), self._rows_offset)

    def close(self) -> None:
        """Let go of it. Memory that a server has open must not be freed: close again once it is unregistered."""
        super().close()
        if self._address and not self.doubtful and self.registered_with is None:
            with self._cuda.on(self._gpu):
                self._cuda.end_stream(self._stream)
                self._cuda.free(self._address)
            self._address = 0

    def _copied_out(self, array: Array, offset: int) -> Array:
        with self._cuda.on(self._gpu):
            self._cuda.copy_out(array.ctypes.data, self._address + offset, array.nbytes, self._stream)
            self._cuda.wait(self._stream)
        return array
