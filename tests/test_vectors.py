"""Distances, nearest and close pairs against float64 done the slow way."""

from __future__ import annotations

import re

import numpy as np
import pytest

from arcface_clients.arrays import unit_rows
from arcface_clients.errors import InvalidEmbeddings
from arcface_clients.people import neighbours
from arcface_clients.people.neighbours import close_pairs, iter_close_pairs, nearest
from arcface_clients.people.vectors import cosine_distance, cosine_distances, distance_blocks


def slow_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return 1 - (a @ b.T) / (np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None])


def people(rng: np.random.Generator, count: int, each: int, dim: int = 64) -> np.ndarray:
    """Rows of `count` clusters of `each`, shuffled."""
    rows = np.repeat(rng.normal(size=(count, dim)), each, axis=0) + 0.4 * rng.normal(size=(count * each, dim))
    return rng.permutation(rows).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 37.5, 1e25, 1e-25])
@pytest.mark.parametrize("dim", [3, 128, 512])
def test_distances_are_exact_to_1e_6_on_rows_of_any_length(rng: np.random.Generator, scale: float, dim: int) -> None:
    a, b = rng.normal(size=(70, dim)) * scale, rng.normal(size=(50, dim))
    assert np.abs(cosine_distances(a, b) - slow_distances(a / scale, b)).max() <= 1e-6
    unit = unit_rows(a)
    assert unit.dtype == np.float32
    assert np.abs(cosine_distances(unit, b) - slow_distances(a / scale, b)).max() <= 1e-6


def test_rows_of_very_different_length_in_one_array_keep_their_precision(rng: np.random.Generator) -> None:
    a = rng.normal(size=(4, 32)) * np.array([[1e-300], [1e-30], [1], [1e200]])
    expected = slow_distances(a / np.abs(a).max(axis=1, keepdims=True), a / np.abs(a).max(axis=1, keepdims=True))
    assert np.abs(cosine_distances(a) - expected).max() <= 1e-6


def test_distances_among_themselves_are_symmetric_with_an_exact_zero_diagonal(rng: np.random.Generator) -> None:
    distances = cosine_distances(rng.normal(size=(16, 512)).astype(np.float32))
    assert (np.diag(distances) == 0).all()
    assert np.abs(distances - distances.T).max() < 1e-6
    assert distances.min() >= 0
    assert distances.max() <= 2


def test_the_single_pair_agrees_with_the_matrix(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 512))
    assert cosine_distance(a, b) == pytest.approx(float(cosine_distances(a[None], b[None])[0, 0]), abs=1e-6)
    assert cosine_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert cosine_distance(a, -a) == pytest.approx(2, abs=1e-12)


def test_blocks_and_a_given_out_hold_the_same_matrix(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    a = rng.normal(size=(53, 8))
    whole = cosine_distances(a)
    monkeypatch.setattr("arcface_clients.people.vectors.BLOCK_ENTRIES", 53 * 10)
    out = np.full((53, 53), np.nan, np.float32)
    assert cosine_distances(a, out=out) is out
    assert np.abs(out - whole).max() < 1e-6
    blocks = [(start, block.copy()) for start, block in distance_blocks(a)]
    assert [start for start, _ in blocks] == [0, 10, 20, 30, 40, 50]
    assert np.abs(np.concatenate([block for _, block in blocks]) - whole).max() < 1e-6


def test_no_rows_are_no_distances() -> None:
    assert cosine_distances(np.empty((0, 512)), np.ones((3, 512))).shape == (0, 3)
    assert nearest(np.empty((0, 512)), k=3)[1].shape == (0, 0)
    assert close_pairs(np.empty((0, 512)))[0].shape == (0,)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], "1 of 2 have no direction, first row 1 is all zero."),
        ([[np.nan, 0.0], [1.0, 0.0]], "1 of 2 have no direction, first row 0 is not finite (NaN or infinity)."),
        ([[1.0, np.inf]], "first row 0 is not finite"),
        ([1.0, 2.0], "expected embeddings as numbers of shape (N, D), got float64 (2,)."),
        ([["a", "b"]], "got <U1 (1, 2)"),
    ],
)
def test_rows_without_a_direction_are_refused_by_number(rows: list, message: str) -> None:
    for function in (cosine_distances, nearest, close_pairs):
        with pytest.raises(InvalidEmbeddings, match=re.escape(message)):
            function(np.array(rows))


def test_widths_that_differ_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(InvalidEmbeddings, match="embeddings of 4 and 5 dimensions cannot be compared"):
        cosine_distances(rng.normal(size=(2, 4)), rng.normal(size=(2, 5)))
    with pytest.raises(InvalidEmbeddings, match="one width"):
        cosine_distance(np.ones(3), np.ones(4))
    with pytest.raises(InvalidEmbeddings, match="the second embedding"):
        cosine_distance(np.ones(3), np.zeros(3))


@pytest.mark.parametrize("block", [7, 16, 2048])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_nearest_equals_a_full_sort(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int, k: int
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    a, b = people(rng, 12, 5), people(rng, 9, 7)
    for first, second in ((a, b), (b, a), (a[:3], b), (a, None)):
        full = slow_distances(first, first if second is None else second)
        if second is None:
            np.fill_diagonal(full, np.inf)
        distances, rows = nearest(first, second, k=k)
        assert rows.shape == (len(first), min(k, full.shape[1] - (second is None)))
        assert np.abs(distances - np.sort(full, axis=1)[:, : rows.shape[1]]).max() <= 1e-6
        assert np.abs(np.take_along_axis(full, rows, axis=1) - distances).max() <= 1e-6
        assert all(len(set(row)) == len(row) for row in rows.tolist())


def test_of_equal_neighbours_the_smaller_row_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 4)
    same = np.tile([[1.0, 0.0, 0.0]], (11, 1))
    _, rows = nearest(same, same.copy(), k=3)
    assert rows.tolist() == [[0, 1, 2]] * 11
    _, rows = nearest(same, k=3)
    assert rows[0].tolist() == [1, 2, 3]
    assert rows[10].tolist() == [0, 1, 2]


def test_candidates_that_come_ever_nearer_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    angle = np.linspace(1.5, 0.0, 1000)
    distances, rows = nearest(np.array([[1.0, 0.0]]), np.stack([np.cos(angle), np.sin(angle)], axis=1), k=4)
    assert rows.tolist() == [[999, 998, 997, 996]]
    assert (np.diff(distances) >= 0).all()


@pytest.mark.parametrize("block", [9, 2048])
def test_close_pairs_are_those_of_the_full_matrix(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    a, b = people(rng, 8, 5), people(rng, 6, 4)
    full = slow_distances(a, a)
    expected = [(i, j) for i in range(len(a)) for j in range(i + 1, len(a)) if full[i, j] <= 0.4]
    i, j, distance = close_pairs(a, max_distance=0.4)
    assert len(expected) > 50
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert np.abs(distance - full[i, j]).max() <= 1e-6
    i, j, _ = close_pairs(a, b, max_distance=0.9)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == list(
        zip(*np.where(slow_distances(a, b) <= 0.9), strict=True)
    )


def test_a_distance_that_joins_everything_is_refused_before_memory_is_full(rng: np.random.Generator) -> None:
    a = rng.normal(size=(100, 8))
    with pytest.raises(InvalidEmbeddings, match="more than 1,000 pairs lie within 2"):
        close_pairs(a, max_distance=2, max_pairs=1000)
    assert sum(len(i) for i, _, _ in iter_close_pairs(a, max_distance=2)) == 4950
