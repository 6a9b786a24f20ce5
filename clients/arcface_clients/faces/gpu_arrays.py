"""Locates faces that are already on a GPU, in a torch, CuPy, JAX or Numba array, without importing those packages.

Two protocols are supported: DLPack (__dlpack__), in which the producer signals when its work is done, and the CUDA
Array Interface (__cuda_array_interface__).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_BYTES, FACE_SHAPE
from arcface_clients.errors import CudaFailed, InvalidFaces
from arcface_clients.gpu.driver import LEGACY_STREAM, CudaDriver, driver

_CUDA, _CUDA_MANAGED = 2, 13  # DLDeviceType
_UINT8 = (1, 8, 1)  # DLDataType: code kDLUInt, bits, lanes


@dataclass(frozen=True)
class GpuFaces:
    """Faces uint8 (count,112,112,3) BGR, C-contiguous, at an address on a GPU, with no work on them pending.

    device: the GPU's number in this process. owner: the object that keeps the memory alive.
    """

    device: int
    address: int
    count: int
    owner: Any

    def __len__(self) -> int:
        """Number of faces."""
        return self.count

    def __getitem__(self, part: slice) -> GpuFaces:
        """A contiguous range of the faces, without a copy."""
        start, stop, step = part.indices(self.count)
        if step != 1:
            raise IndexError(f"faces on a GPU can only be sliced contiguously, not with a step of {step}")
        return GpuFaces(self.device, self.address + start * FACE_BYTES, max(stop - start, 0), self.owner)

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return self.count * FACE_BYTES

    @property
    def shape(self) -> tuple[int, ...]:
        """(count,112,112,3)."""
        return (self.count, *FACE_SHAPE)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Lets torch.as_tensor and cupy.asarray read the faces."""
        return {"shape": self.shape, "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}

    def to_host(self) -> Array:
        """A copy in host memory, uint8 (count,112,112,3)."""
        faces = np.empty(self.shape, np.uint8)
        cuda = driver()
        with cuda.on(self.device):
            cuda.copy_out(faces.ctypes.data, self.address, self.nbytes, LEGACY_STREAM)
            cuda.wait(LEGACY_STREAM)
        return faces


def is_on_gpu(faces: Any) -> bool:
    """Whether this is an array on an NVIDIA GPU."""
    if isinstance(faces, (np.ndarray, list, tuple)):
        return False
    if hasattr(faces, "__dlpack_device__"):
        try:
            return int(faces.__dlpack_device__()[0]) in (_CUDA, _CUDA_MANAGED)
        except (BufferError, RuntimeError, TypeError, ValueError):
            return False  # on several devices, or on a device type unknown to DLPack
    return hasattr(faces, "__cuda_array_interface__")


def copy_to_gpu(faces_bgr_u8: Array, device: int = 0) -> GpuFaces:
    """Copy checked faces uint8 (N,112,112,3) to a GPU, freed with the last reference; for benchmarks and tests.

    Raises:
        DependencyMissing, CudaFailed: there is no such GPU, or not enough memory on it.
    """
    memory = _Memory(driver(), device, max(faces_bgr_u8.nbytes, 1))
    with memory.cuda.on(device):
        memory.cuda.copy_in(memory.address, faces_bgr_u8.ctypes.data, faces_bgr_u8.nbytes, LEGACY_STREAM)
        memory.cuda.wait(LEGACY_STREAM)
    return GpuFaces(device, memory.address, len(faces_bgr_u8), memory)


class _Memory:
    """GPU memory that is freed with its last reference."""

    def __init__(self, cuda: CudaDriver, device: int, byte_size: int) -> None:
        self.cuda, self.device = cuda, device
        with cuda.on(device):
            self.address = cuda.allocate(byte_size)

    def __del__(self) -> None:
        # never allocated; or the process is exiting and the driver is already gone
        with suppress(AttributeError, CudaFailed), self.cuda.on(self.device):
            self.cuda.free(self.address)


def locate(faces: Any) -> Array | GpuFaces:
    """Locate an array on a GPU, and wait until its producer has finished with it."""
    if isinstance(faces, GpuFaces):
        return faces
    found = _by_dlpack(faces) if hasattr(faces, "__dlpack_device__") else _by_cuda_array_interface(faces)
    shape, is_uint8, contiguous, gpu_faces = found
    if shape == FACE_SHAPE:
        shape = (1, *shape)
    if len(shape) != 4 or shape[1:] != FACE_SHAPE:
        hint = " This looks like NCHW: pass faces.permute(0, 2, 3, 1).contiguous()." if shape[1:2] == (3,) else ""
        raise InvalidFaces(f"expected faces of shape (N, 112, 112, 3) BGR, got {shape}, on a GPU.{hint}")
    if not is_uint8:
        raise InvalidFaces("expected faces of dtype uint8 (0..255), got another dtype, on a GPU. Round and cast first.")
    if not contiguous:
        raise InvalidFaces(
            "the faces on the GPU are not C-contiguous: pass faces.contiguous() or cupy.ascontiguousarray(faces)."
        )
    if shape[0] == 0:
        return np.empty(shape, np.uint8)
    return gpu_faces


_Found = tuple[tuple[int, ...], bool, bool, GpuFaces]  # shape, whether uint8, whether contiguous, location


def _by_dlpack(faces: Any) -> _Found:
    """Through DLPack: the legacy stream waits for the producer's, and we wait for the legacy stream."""
    cuda, device = driver(), int(faces.__dlpack_device__()[1])
    with cuda.on(device):  # torch uses the streams of the current device
        try:
            capsule = faces.__dlpack__(stream=LEGACY_STREAM)
        except (BufferError, RuntimeError, TypeError) as exc:
            raise InvalidFaces(f"an array on a GPU cannot be read ({exc}): pass faces.detach().contiguous().") from exc
        cuda.wait(LEGACY_STREAM)
    pointer = _capsule_pointer(capsule, b"dltensor")
    tensor = ctypes.cast(pointer, ctypes.POINTER(_DLTensor)).contents
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    is_uint8 = (tensor.code, tensor.bits, tensor.lanes) == _UINT8
    place = GpuFaces(device, (tensor.data or 0) + tensor.byte_offset, _faces_in(shape), capsule)
    return shape, is_uint8, _contiguous(shape, strides, 1), place


def _by_cuda_array_interface(faces: Any) -> _Found:
    """Through the CUDA Array Interface, version 2 or 3."""
    said = faces.__cuda_array_interface__
    shape, strides, address = tuple(said["shape"]), said.get("strides"), said["data"][0]
    is_uint8 = said["typestr"] == "|u1"
    cuda = driver()
    device, stream = 0, said.get("stream")
    if math.prod(shape):
        device = cuda.device_of(address)
        if stream is not None or said.get("version", 0) < 3:  # version 3 without a stream: nothing is pending
            with cuda.on(device):
                cuda.wait(stream)
    contiguous = _contiguous(shape, strides, int(said["typestr"][2:] or 1))
    return shape, is_uint8, contiguous, GpuFaces(device, address, _faces_in(shape), faces)


def _faces_in(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) == 4 else 1


def _contiguous(shape: Sequence[int], strides: Sequence[int] | None, item: int) -> bool:
    """Whether these strides (in units of which one item takes `item`) are those of a C-contiguous array."""
    expected = item
    for size, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h, the first field of a DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _capsule_pointer(capsule: Any, name: bytes) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    return int(get(capsule, name))
