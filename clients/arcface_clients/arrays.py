"""Type aliases for the arrays that packages exchange, and normalisation of rows to unit length."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from arcface_clients.errors import InvalidEmbeddings

Array = npt.NDArray[Any]
"""Any array: the dtype is checked where it arrives."""
FaceArray = npt.NDArray[np.uint8]
"""Faces uint8 (N,112,112,3) BGR."""
FloatArray = npt.NDArray[np.float32]
"""Embeddings float32 (N,D), or distances."""

DAMAGED = (ValueError, EOFError, SyntaxError, RuntimeError, MemoryError, TokenError, zipfile.BadZipFile, zlib.error)
"""What NumPy and zipfile raise over a .npy or .npz that is damaged, locked, or of a size that cannot be."""

# Norms outside this range are recomputed in float64 after scaling: their squares overflow or underflow float32.
SMALLEST_NORM, LARGEST_NORM = 1e-18, 1e18


def unit_rows(embeddings: Array | Sequence[Sequence[float]], what: str = "embeddings") -> Array:
    """A float32 (N,D) C-contiguous copy with rows of unit L2 norm; norms are summed in float64.

    Raises:
        InvalidEmbeddings: not an (N,D) array of numbers, or a row is all zero or contains NaN or infinity.
    """
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InvalidEmbeddings(f"expected {what} as numbers of shape (N, D), got {array.dtype} {array.shape}.")
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.array(array, np.float32, order="C")
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    odd = np.flatnonzero(~((norms > SMALLEST_NORM) & (norms < LARGEST_NORM)))
    if odd.size:
        exact = array[odd].astype(np.float64)
        scale = np.abs(exact).max(axis=1, initial=0)
        bad = odd[~(np.isfinite(scale) & (scale > 0))]
        if bad.size:
            raise InvalidEmbeddings(no_direction(array, bad, what))
        exact /= scale[:, None]
        rows[odd] = exact / np.linalg.norm(exact, axis=1, keepdims=True)
        norms[odd] = 1
    rows /= norms.astype(np.float32)[:, None]
    return rows


def no_direction(array: Array, bad: Array, what: str) -> str:
    """The error message for rows `bad` of an (N,D) array that are zero or not finite."""
    kind = "all zero" if not np.any(array[bad[0]]) else "not finite (NaN or infinity)"
    return f"{what}: {bad.size} of {len(array)} have no direction, first row {bad[0]} is {kind}. Embed that face again."
