"""Checks that faces are uint8 (N,112,112,3) BGR, as the models expect, and says what is wrong if they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from arcface_clients.arrays import Array, FaceArray
from arcface_clients.contract import FACE_SHAPE
from arcface_clients.errors import InvalidFaces
from arcface_clients.faces.gpu_arrays import GpuFaces, copy_to_gpu, is_on_gpu, locate

Faces = FaceArray | GpuFaces
"""Checked faces, in host memory or on a GPU."""


class DlpackArray(Protocol):
    """An array of torch, CuPy, JAX or Numba, on a GPU or not."""

    def __dlpack_device__(self) -> tuple[Any, Any]:
        """Device type and number."""
        ...


class CudaArray(Protocol):
    """An array on a GPU that supports only the CUDA Array Interface."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        """Address and layout."""
        ...


FacesLike = Array | Sequence[Array] | DlpackArray | CudaArray
"""What callers may pass; checked at run time by `check_faces`."""


def check_faces(faces: FacesLike) -> FaceArray:
    """Faces as the server expects them: uint8 (N,112,112,3), C-contiguous; one face (112,112,3) becomes N = 1.

    Floats are accepted if they are whole numbers in 0..255 (some loaders return those); N = 0 is fine. An array on a
    GPU (uint8, C-contiguous) is copied to the host.

    Raises:
        InvalidFaces: wrong shape or dtype, values that are not whole numbers in 0..255, NaN.
    """
    if not isinstance(faces, np.ndarray):
        faces = _on_host(faces)
    try:
        array = np.asarray(faces)
    except ValueError as exc:  # a list of crops of different sizes
        raise InvalidFaces(
            f"the faces have different shapes: expected crops of {FACE_SHAPE} each ({exc}). "
            "Align and resize first: arcface embed --detect does it for photos"
        ) from exc
    if array.size == 0 and array.ndim <= 1:
        return np.empty((0, *FACE_SHAPE), np.uint8)
    if array.shape == FACE_SHAPE:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != FACE_SHAPE:
        hint = ""
        if array.ndim == 4 and array.shape[1] == 3:
            hint = " This looks like NCHW: pass faces.transpose(0, 2, 3, 1), BGR, before any normalisation."
        raise InvalidFaces(f"expected faces of shape (N, 112, 112, 3) BGR, got {array.shape}.{hint}")
    if array.dtype != np.uint8:
        array = _whole_numbers(array)
    return np.ascontiguousarray(array)


def check_in_place(faces: FacesLike | Faces) -> Faces:
    """Like `check_faces`, but faces on a GPU stay there.

    Raises:
        InvalidFaces: see `check_faces`; on a GPU, only uint8, C-contiguous arrays are accepted.
        DependencyMissing, CudaFailed: the array is on a GPU, but the driver cannot be used.
    """
    if isinstance(faces, np.ndarray) or not is_on_gpu(faces):
        return check_faces(faces)
    return locate(faces)


def to_gpu(faces_bgr_u8: FacesLike, device: int = 0) -> GpuFaces:
    """A checked copy of faces uint8 (N,112,112,3) on a GPU; see `copy_to_gpu`."""
    return copy_to_gpu(check_faces(faces_bgr_u8), device)


def _on_host(faces: Any) -> Any:
    """Copy faces from a GPU to the host; return anything else unchanged."""
    if is_on_gpu(faces):
        faces = check_in_place(faces)
        return faces if isinstance(faces, np.ndarray) else faces.to_host()
    if isinstance(faces, (list, tuple)) and len(faces) and is_on_gpu(faces[0]):
        raise InvalidFaces("got a list of arrays on a GPU: expected one array, such as torch.stack(faces).")
    return faces


def _whole_numbers(array: Array) -> FaceArray:
    """Cast numbers that are whole and within 0..255 to uint8; anything else is refused, never rounded."""
    if array.dtype.kind not in "fiu":
        raise InvalidFaces(f"expected faces of dtype uint8 (0..255), got {array.dtype}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise InvalidFaces(f"face {bad} contains NaN or infinity: expected pixel values 0..255.")
    if array.size == 0:
        return array.astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 255:
        hint = " They look already normalised: pass the raw BGR crop, the server normalises." if low >= -4 else ""
        raise InvalidFaces(f"expected pixel values 0..255, got {low:g}..{high:g}.{hint}")
    if array.dtype.kind == "f" and (array != np.floor(array)).any():
        hint = " They look scaled to 0..1: multiply by 255 and round." if high <= 1 else " Round to uint8 yourself."
        raise InvalidFaces(f"expected whole pixel values 0..255, got fractions (range {low:g}..{high:g}).{hint}")
    return array.astype(np.uint8)
