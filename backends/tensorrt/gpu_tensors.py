"""Triton's tensors in a GPU's memory as address, shape and dtype, and back, through DLPack and without a package.

Triton hands a tensor over as a capsule named "dltensor" that holds a DLManagedTensor, and takes one the same way. The
layout is that of dlpack.h 0.x, which every version of Triton's python backend uses.
"""

import ctypes

import numpy as np

CUDA = 2  # kDLCUDA
_NAME = b"dltensor"  # capsules keep the address of their name, so it must live as long as this module
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode, by numpy's letter


class _Tensor(ctypes.Structure):
    _fields_ = [
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
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _Deleter)]


ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
ctypes.pythonapi.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

_lent = {}  # what Triton still reads, by the address of its DLManagedTensor


class Rows:
    """A request's rows of one input: on the host as `array`, or at `address` on the GPU; both have shape and dtype."""

    def __init__(self, tensor):
        """Read a pb_utils.Tensor; nothing is copied."""
        self.array = self.address = None
        if tensor.is_cpu():
            self.array = tensor.as_numpy()
            self.shape, self.dtype = self.array.shape, self.array.dtype
            return
        self._capsule = tensor.to_dlpack()  # the memory is ours while the capsule lives
        there = _Managed.from_address(ctypes.pythonapi.PyCapsule_GetPointer(self._capsule, _NAME)).tensor
        letter = next((letter for letter, code in _KINDS.items() if code == there.code), "")
        self.shape = tuple(there.shape[i] for i in range(there.ndim))
        self.dtype = np.dtype(f"{letter}{there.bits // 8}")
        self.address = there.data + there.byte_offset

    def __len__(self):
        """The number of rows."""
        return self.shape[0]


def lend(address, shape, dtype, device):
    """A capsule for pb_utils.Tensor.from_dlpack: our memory on a GPU, which must stay as it is until it is read."""
    sides = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed()
    managed.tensor = _Tensor(
        address, CUDA, device, len(shape), _KINDS[dtype.kind], dtype.itemsize * 8, 1, sides, None, 0
    )
    managed.deleter = _returned
    place = ctypes.addressof(managed)
    _lent[place] = (managed, sides)
    return ctypes.pythonapi.PyCapsule_New(place, _NAME, None)


@_Deleter
def _returned(place):
    _lent.pop(place, None)
