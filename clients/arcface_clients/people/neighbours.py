"""Finds nearest neighbours, or all pairs within a distance, without building the full distance matrix.

Both work on blocks of 2,048 × 2,048 similarities, which fit the CPU cache. Each block is compared with the score that
its rows have to beat; few entries do, so almost nothing is sorted. Within one set (`b` None) each pair is compared
once: a block of the upper triangle serves its rows and its columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.errors import InvalidEmbeddings
from arcface_clients.people.vectors import unit_pair

BLOCK = 2048


def nearest(a: Array, b: Array | None = None, k: int = 10) -> tuple[Array, Array]:
    """The k nearest rows of `b` (M,D) to each row of `a` (N,D); without `b`, the k nearest other rows of `a`.

    Returns:
        distances float32 (N,k) ascending, rows int64 (N,k); k is capped at the number of candidates. Ties go to the
        smaller row.

    Raises:
        InvalidEmbeddings: k < 1, different widths, or a row is all zero or contains NaN.
    """
    return nearest_unit(*unit_pair(a, b), k=k)


def nearest_unit(rows: Array, columns: Array, k: int) -> tuple[Array, Array]:
    """`nearest` on float32 rows that already have unit norm; `columns is rows` means within one set."""
    if k < 1:
        raise InvalidEmbeddings(f"expected k of at least 1, got {k}.")
    alone = columns is rows
    k = min(k, len(columns) - alone) if len(columns) else 0
    best = np.full((len(rows), k), -np.inf, np.float32)
    index = np.full((len(rows), k), -1, np.int64)
    if k > 0:
        mask = np.empty(BLOCK * BLOCK, bool)
        for r, c, block in _blocks(rows, columns, alone):
            if alone and r == c:
                np.fill_diagonal(block, -np.inf)
            _offer(best[r : r + len(block)], index[r : r + len(block)], block, c, 1, mask)
            if alone and r != c:
                _offer(best[c : c + block.shape[1]], index[c : c + block.shape[1]], block, r, 0, mask)
    return np.clip(1 - best, 0, 2), index


def close_pairs(
    a: Array, b: Array | None = None, max_distance: float = 0.5, max_pairs: int = 20_000_000
) -> tuple[Array, Array, Array]:
    """All pairs within `max_distance`: (i int64, j int64, distance float32), ordered by i, then j; i < j without `b`.

    Raises:
        InvalidEmbeddings: more than `max_pairs` pairs (20 bytes each), different widths, zero or NaN rows.
    """
    found: list[tuple[Array, Array, Array]] = []
    total = 0
    for part in iter_close_pairs(a, b, max_distance):
        total += len(part[0])
        if total > max_pairs:
            raise InvalidEmbeddings(
                f"more than {max_pairs:,} pairs lie within {max_distance}: expected a distance that separates people. "
                "Lower max_distance, raise max_pairs, or iterate block by block with iter_close_pairs()."
            )
        found.append(part)
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    i, j, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], distance[order]


def iter_close_pairs(
    a: Array, b: Array | None = None, max_distance: float = 0.5
) -> Iterator[tuple[Array, Array, Array]]:
    """Yield the pairs of `close_pairs` block by block, so that any number of them fits in memory."""
    rows, columns = unit_pair(a, b)
    alone = columns is rows
    # A pair at exactly max_distance belongs to the result even though 1 − cosine is rounded.
    floor = np.nextafter(np.float32(1 - max_distance), np.float32(-np.inf))
    mask = np.empty(BLOCK * BLOCK, bool)
    for r, c, block in _blocks(rows, columns, alone):
        hits = np.flatnonzero(np.greater(block.ravel(), floor, out=mask[: block.size]))
        i, j = np.divmod(hits, block.shape[1])
        if alone and r == c:
            upper = i < j
            hits, i, j = hits[upper], i[upper], j[upper]
        if len(hits):
            yield i + r, j + c, np.clip(1 - block.ravel()[hits], 0, 2)


def _blocks(rows: Array, columns: Array, alone: bool) -> Iterator[tuple[int, int, Array]]:
    """(first row, first column, similarities) of blocks in row order; only the upper triangle if `alone`.

    The array is reused. Few rows get wide blocks: one query against 100,000 is one product.
    """
    width = max(BLOCK, BLOCK * BLOCK // max(len(rows), 1)) if not alone else BLOCK
    buffer = np.empty(BLOCK * BLOCK, np.float32)
    for r in range(0, len(rows), BLOCK):
        left = rows[r : r + BLOCK]
        for c in range(r if alone else 0, len(columns), width):
            right = columns[c : c + width]
            block = buffer[: len(left) * len(right)].reshape(len(left), len(right))
            yield r, c, np.dot(left, right.T, out=block)


def _offer(best: Array, index: Array, block: Array, first: int, axis: int, mask: Array) -> None:
    """Merge a block into the running best (R,k) and their index (R,k), in place.

    Args:
        best: similarities, descending.
        index: their rows in the candidates.
        block: similarities; candidates lie along `axis`, starting with candidate `first`.
        mask: scratch bool (BLOCK·BLOCK,).
    """
    k = best.shape[1]
    floor = best[:, -1]
    hits = _above(block, floor, axis, mask)
    if len(hits) > 8 * k * len(best):  # the first block, or steadily nearer candidates: raise the floor first
        floor = np.maximum(floor, np.nextafter(_kth_bound(block, k, axis), np.float32(-np.inf)))
        hits = _above(block, floor, axis, mask)
    if not len(hits):
        return
    i, j = np.divmod(hits, block.shape[1])
    row, candidate = (i, j) if axis else (j, i)
    similarity = block.ravel()[hits]
    order = np.lexsort((-similarity, row))  # stable: among equals the smaller candidate stays first
    row, candidate, similarity = row[order], candidate[order], similarity[order]
    starts = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
    group = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(row)]))
    rank = np.arange(len(row)) - starts[group]
    kept = rank < k
    changed = row[starts]
    pool = np.full((len(changed), 2 * k), -np.inf, np.float32)
    pool_index = np.full((len(changed), 2 * k), -1, np.int64)
    pool[:, :k], pool_index[:, :k] = best[changed], index[changed]
    pool[group[kept], k + rank[kept]] = similarity[kept]
    pool_index[group[kept], k + rank[kept]] = candidate[kept] + first
    top = np.argsort(-pool, axis=1, kind="stable")[:, :k]
    best[changed] = np.take_along_axis(pool, top, axis=1)
    index[changed] = np.take_along_axis(pool_index, top, axis=1)


def _above(block: Array, floor: Array, axis: int, mask: Array) -> Array:
    """Flat positions in `block` (C order) of the entries above the floor of their row or column."""
    part = mask[: block.size]
    np.greater(block, floor[:, None] if axis else floor[None, :], out=part.reshape(block.shape))
    return np.flatnonzero(part)


def _kth_bound(block: Array, k: int, axis: int) -> Array:
    """A value that at least k candidates of each row reach: the k-th largest maximum over groups of candidates."""
    count = block.shape[axis]
    groups = min(count, max(4 * k, 64))
    if groups < k:
        return np.full(block.shape[1 - axis], -np.inf, np.float32)
    size = count // groups
    if axis:
        maxima = block[:, : groups * size].reshape(len(block), groups, size).max(axis=2)
        return np.asarray(np.partition(maxima, groups - k, axis=1)[:, groups - k])
    maxima = block[: groups * size].reshape(groups, size, block.shape[1]).max(axis=1)
    return np.asarray(np.partition(maxima, groups - k, axis=0)[groups - k])
