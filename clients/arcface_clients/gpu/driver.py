"""The CUDA driver (libcuda.so.1) through ctypes: memory on a GPU that another process can open, and copies to it.

The library ships with the GPU's driver, so there is nothing to install and no version to match. Its contexts can be
pushed and popped: the caller's current device does not change, and no other GPU gets a context as a side effect.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from arcface_clients.errors import CudaFailed, DependencyMissing

LIBRARY = "libcuda.so.1"
DEVELOPMENT_NAME = "libcuda.so"  # the name that Triton's python backend opens
LIBRARY_VARIABLE = "ARCFACE_LIBCUDA"  # overrides the library, for one outside the loader's path
IPC_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE; the runtime's cudaIpcMemHandle_t is the same bytes
LEGACY_STREAM = 1  # CU_STREAM_LEGACY, the default stream of all threads
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy stream
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL

_address, _size, _handle, _int, _out = (
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_void_p,
)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # CUDA Driver API; cuda.h maps the plain names to the _v2 ones
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (_out, _int),
    "cuDevicePrimaryCtxRetain": (_out, _int),
    "cuCtxPushCurrent_v2": (_handle,),
    "cuCtxPopCurrent_v2": (_out,),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (_out, _size),
    "cuMemFree_v2": (_address,),
    "cuMemcpyHtoDAsync_v2": (_address, _handle, _size, _handle),
    "cuMemcpyDtoHAsync_v2": (_handle, _address, _size, _handle),
    "cuMemcpyDtoDAsync_v2": (_address, _address, _size, _handle),
    "cuMemsetD8Async": (_address, ctypes.c_ubyte, _size, _handle),
    "cuStreamCreate": (_out, ctypes.c_uint),
    "cuStreamSynchronize": (_handle,),
    "cuStreamDestroy_v2": (_handle,),
    "cuIpcGetMemHandle": (_out, _address),
    "cuPointerGetAttribute": (_out, _int, _address),
    "cuGetErrorString": (_int, _out),
}


class CudaDriver:
    """The calls that a region needs. All but `on` and `device_of` must be made inside `with driver.on(device)`.

    Addresses are on the device unless named `host`. Copies are asynchronous: call `wait` before anyone else touches
    the memory. Every call raises CudaFailed with the driver's own message.
    """

    def __init__(self, library: Any) -> None:
        """Initialise the driver; creates no context yet."""
        self._library = library
        for name, arguments in _FUNCTIONS.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = _int
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._lock = threading.Lock()
        self._call("cuInit", 0)

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Work on this GPU, in the context that the CUDA runtime (hence torch and CuPy) uses too.

        Args:
            device: its number in this process (CUDA_VISIBLE_DEVICES).
        """
        self._call("cuCtxPushCurrent_v2", self._context(device))
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, byte_size: int) -> int:
        """The address of new memory on the current GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), byte_size)
        return address.value

    def free(self, address: int) -> None:
        """Free memory; no other process may still have it open."""
        self._call("cuMemFree_v2", address)

    def ipc_handle(self, address: int) -> bytes:
        """The handle with which another process opens this memory; `address` must be the start of an allocation."""
        handle = ctypes.create_string_buffer(IPC_HANDLE_BYTES)
        self._call("cuIpcGetMemHandle", handle, address)
        return handle.raw

    def stream(self) -> int:
        """A new stream that does not wait for any other."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def end_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cuStreamDestroy_v2", stream)

    def copy_in(self, address: int, host: int, byte_size: int, stream: int) -> None:
        """Copy host to device."""
        self._call("cuMemcpyHtoDAsync_v2", address, host, byte_size, stream)

    def copy_out(self, host: int, address: int, byte_size: int, stream: int) -> None:
        """Copy device to host."""
        self._call("cuMemcpyDtoHAsync_v2", host, address, byte_size, stream)

    def copy_within(self, address: int, source: int, byte_size: int, stream: int) -> None:
        """Copy within one device."""
        self._call("cuMemcpyDtoDAsync_v2", address, source, byte_size, stream)

    def fill(self, address: int, byte: int, byte_size: int, stream: int) -> None:
        """Set every byte."""
        self._call("cuMemsetD8Async", address, byte, byte_size, stream)

    def wait(self, stream: int | None) -> None:
        """Wait for all work on a stream, or on the whole GPU if None."""
        if stream is None:
            self._call("cuCtxSynchronize")
        else:
            self._call("cuStreamSynchronize", stream)

    def device_of(self, address: int) -> int:
        """Number of the GPU that holds an address."""
        device = _int()
        self._call("cuPointerGetAttribute", ctypes.byref(device), _DEVICE_ORDINAL, address)
        return device.value

    def _context(self, device: int) -> ctypes.c_void_p:
        with self._lock:
            if device not in self._contexts:
                number, context = _int(), ctypes.c_void_p()
                self._call("cuDeviceGet", ctypes.byref(number), device)
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number.value)
                self._contexts[device] = context
            return self._contexts[device]

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            words = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(words))
            said = (words.value or b"no description").decode(errors="replace")
            raise CudaFailed(f"CUDA: {name} returned {status} ({said}). Check the GPU: nvidia-smi")


@lru_cache(maxsize=1)
def driver() -> CudaDriver:
    """The driver of this process, initialised on first use.

    Raises:
        DependencyMissing: there is no CUDA driver on this host.
        CudaFailed: it does not initialise (no GPU, or none that this process may use).
    """
    file = os.environ.get(LIBRARY_VARIABLE) or LIBRARY
    try:
        library = ctypes.CDLL(file)
        return CudaDriver(library)
    except (OSError, AttributeError) as exc:
        if isinstance(exc, CudaFailed):
            raise
        raise DependencyMissing(
            f"no CUDA driver on this host ({exc}). Install NVIDIA's driver; start a container with --gpus"
        ) from exc


def found_under_development_name() -> bool:
    """Whether the driver can be opened as libcuda.so too, not only as libcuda.so.1.

    Triton's python backend opens that name (pb_utils.cc), and without it silently keeps every tensor on the host.
    """
    try:
        ctypes.CDLL(DEVELOPMENT_NAME)
    except OSError:
        return False
    return True
