"""Room for the largest batch of one tensor, pinned on the host and on the GPU, and the copies between the two."""

import ctypes

import gpu_tensors
import numpy as np
import plan_files
import triton_python_backend_utils as pb_utils

if not plan_files.NOT_INSTALLED:
    from polygraphy import cuda


class Buffer:
    """The memory of one tensor: `host` is a pinned array, `device` an address on the GPU; copies go onto a stream."""

    def __init__(self, shape, dtype, runtime, stream):
        size = int(np.prod(shape)) * dtype.itemsize
        pointer = ctypes.c_void_p()
        runtime.check(runtime.handle.cudaMallocHost(ctypes.byref(pointer), ctypes.c_size_t(size)))
        self.host = np.frombuffer((ctypes.c_byte * size).from_address(pointer.value), dtype).reshape(shape)
        self.device = runtime.malloc(size)
        self.row_bytes = size // shape[0]
        self.cuda, self.stream = runtime, stream

    def free(self):
        """Give the memory back; nothing may point there any more."""
        self.cuda.free(self.device)
        self.cuda.check(self.cuda.handle.cudaFreeHost(ctypes.c_void_p(self.host.ctypes.data)))

    def gather(self, parts):
        """Put the rows of all requests one after another into the memory on the GPU; host rows in one copy."""
        start, first = 0, None
        for part in [*parts, None]:
            if part is not None and part.address is None:
                first = start if first is None else first
                self.host[start : start + len(part)] = part.array
            elif first is not None:  # the host rows so far
                offset, size = first * self.row_bytes, (start - first) * self.row_bytes
                self._copy(self.device + offset, self.host.ctypes.data + offset, size, "HostToDevice")
                first = None
            if part is not None and part.address is not None:
                size = len(part) * self.row_bytes
                self._copy(self.device + start * self.row_bytes, part.address, size, "DeviceToDevice")
            start += len(part) if part is not None else 0

    def fetch(self, rows):
        """Copy the first rows from the GPU to the host."""
        self._copy(self.host.ctypes.data, self.device, rows * self.row_bytes, "DeviceToHost")

    def tensor(self, name, rows, device, final):
        """Some rows for a response: on this GPU, or (device None) on the host, copied unless they are final."""
        if device is None:
            return pb_utils.Tensor(name, self.host[rows] if final else self.host[rows].copy())
        shape = (rows.stop - rows.start, *self.host.shape[1:])
        place = self.device + rows.start * self.row_bytes
        return pb_utils.Tensor.from_dlpack(name, gpu_tensors.lend(place, shape, self.host.dtype, device))

    def _copy(self, target, source, size, kind):
        self.cuda.memcpy(target, source, size, getattr(cuda.MemcpyKind, kind), self.stream)
