"""Cosine distances (1 − cosine, 0..2) between embeddings, by float32 matrix products in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from arcface_clients.arrays import Array, no_direction, unit_rows
from arcface_clients.errors import InvalidEmbeddings

# Entries of a distance matrix computed at once: 100 MB of float32, such as 512 rows against 50,000.
BLOCK_ENTRIES = 25 << 20


def cosine_distance(a: Array | Sequence[float], b: Array | Sequence[float]) -> float:
    """1 − cosine of two embeddings (D,), in float64.

    Raises:
        InvalidEmbeddings: not two vectors of one width, or one of them is zero or contains NaN.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InvalidEmbeddings(f"expected two embeddings (D,) of one width, got {x.shape} and {y.shape}.")
    for name, vector in (("first", x), ("second", y)):
        scale = np.abs(vector).max(initial=0)
        if not (np.isfinite(scale) and scale > 0):
            raise InvalidEmbeddings(no_direction(vector[None], np.array([0]), f"the {name} embedding"))
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(1 - (x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)), 0, 2))


def cosine_distances(a: Array, b: Array | None = None, out: Array | None = None) -> Array:
    """All distances between rows of `a` (N,D) and rows of `b` (M,D), or within `a`: float32 (N,M).

    The result is the only large array: if it does not fit in memory, `out` may be an np.memmap. If you need only the
    nearest or the close pairs, use `neighbours.nearest` or `neighbours.close_pairs`, which never build it.

    Raises:
        InvalidEmbeddings: the widths differ, `out` does not fit, or a row is all zero or contains NaN.
    """
    rows, columns = unit_pair(a, b)
    shape = (len(rows), len(columns))
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise InvalidEmbeddings(f"expected out as float32 {shape}, got {out.dtype} {out.shape}.")
    height = _block_rows(columns)
    for start in range(0, len(rows), height):
        _distances(rows, columns, start, out[start : start + height])
    return out


def distance_blocks(a: Array, b: Array | None = None) -> Iterator[tuple[int, Array]]:
    """The same matrix, up to 100 MB at a time: (first row, float32 (R,M)); a block is overwritten by the next.

    Raises:
        InvalidEmbeddings: see `cosine_distances`.
    """
    rows, columns = unit_pair(a, b)
    height = _block_rows(columns)
    block = np.empty((min(height, len(rows)), len(columns)), np.float32)
    for start in range(0, len(rows), height):
        yield start, _distances(rows, columns, start, block[: len(rows) - start])


def unit_pair(a: Array, b: Array | None) -> tuple[Array, Array]:
    """Unit rows of both; if `b` is None, the same array twice (callers test identity)."""
    rows = unit_rows(a)
    columns = rows if b is None else unit_rows(b, "the second embeddings")
    if rows.shape[1] != columns.shape[1]:
        raise InvalidEmbeddings(
            f"embeddings of {rows.shape[1]} and {columns.shape[1]} dimensions cannot be compared: they come from "
            "different models. Embed both with one model: arcface embed"
        )
    return rows, columns


def _block_rows(columns: Array) -> int:
    return max(1, BLOCK_ENTRIES // max(len(columns), 1))


def _distances(rows: Array, columns: Array, start: int, out: Array) -> Array:
    """Distances of rows[start:start+len(out)] to all columns, into `out`; exactly 0 from a row to itself."""
    np.dot(rows[start : start + len(out)], columns.T, out=out)
    np.subtract(1, out, out=out)
    np.minimum(np.maximum(out, 0, out=out), 2, out=out)  # a quarter of the time of np.clip
    if columns is rows:
        np.fill_diagonal(out[:, start:], 0)
    return out
