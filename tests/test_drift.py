"""Drift report, its targets, and the regression test of two engines."""

from __future__ import annotations

import json

import numpy as np
import pytest

from arcface_clients.errors import GateFailed, InvalidFaces
from arcface_clients.evidence.drift import check_targets, compare_embeddings
from arcface_clients.evidence.gate import run_embedding_regression_tests


def unit(rows: int, seed: int = 0, dim: int = 128) -> np.ndarray:
    array = np.random.default_rng(seed).normal(size=(rows, dim))
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def drifted(reference: np.ndarray, drift: np.ndarray | float) -> np.ndarray:
    """Unit rows at exactly 1 − cosine = drift from the reference's."""
    other = np.random.default_rng(9).normal(size=reference.shape)
    other -= np.sum(other * reference, axis=1, keepdims=True) * reference
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosine = 1 - np.broadcast_to(drift, len(reference))[:, None]
    return cosine * reference + np.sqrt(1 - cosine**2) * other


def test_worst_faces_come_by_index_and_path_and_the_histogram_counts_every_face():
    reference = unit(50)
    drift = np.full(50, 2e-4)
    drift[[7, 31]] = 0.02, 0.2
    report = compare_embeddings(reference, drifted(reference, drift), [f"p/{i}.jpg" for i in range(50)])
    assert [(w.index, w.name) for w in report.worst_faces[:2]] == [(31, "p/31.jpg"), (7, "p/7.jpg")]
    assert report.worst_face == 31
    assert report.max_drift == pytest.approx(0.2)
    assert report.mean_cosine == pytest.approx(1 - drift.mean())
    assert report.max_l2 == pytest.approx(np.sqrt(2 * 0.2))
    assert report.percentiles["50"] == pytest.approx(1 - 2e-4)
    edges, counts = report.histogram["edges"], report.histogram["counts"]
    assert sum(counts) == 50
    assert counts[edges.index(0.000177828)] == 48, "2e-4 lies in the second bin after 1e-4"
    assert json.loads(json.dumps(report.to_json()))["worst_faces"][0]["index"] == 31


def test_rows_with_nan_or_zero_are_counted_and_fail_instead_of_stopping_the_report():
    reference = unit(6)
    candidate = reference.copy()
    candidate[2] = np.nan
    candidate[4] = 0
    report = compare_embeddings(reference, candidate)
    assert (report.bad_rows, report.min_cosine, report.worst_face) == (2, 0.0, 2)
    assert report.norms["candidate"]["min"] == pytest.approx(1)
    with pytest.raises(InvalidFaces, match="1 of 6 embeddings are zero or contain NaN, first at row 2"):
        compare_embeddings(np.where(np.arange(6)[:, None] == 2, 0, reference), reference)


def test_length_shows_in_norms_and_l2_though_the_cosine_is_one():
    reference = unit(5)
    report = compare_embeddings(reference, 20 * reference)
    assert report.min_cosine == pytest.approx(1)
    assert report.norms["candidate"]["mean"] == pytest.approx(20)
    assert report.mean_l2 == pytest.approx(19)


@pytest.mark.parametrize(
    ("drift", "statuses"),
    [
        (0.0, ["met", "met", "met"]),
        (0.003, ["met", "met", "missed"]),  # L2 of unit rows is √(2·drift): 0.077
        (0.008, ["missed", "met", "warning"]),
        (0.015, ["warning", "missed", "warning"]),
        (0.03, ["warning", "warning", "warning"]),
    ],
)
def test_figures_are_met_missed_or_a_warning(drift, statuses):
    reference = unit(20)
    verdicts = check_targets(compare_embeddings(reference, drifted(reference, drift)))
    assert [v.status for v in verdicts] == statuses


def test_regression_names_the_faces_beyond_max_drift():
    reference = unit(5)
    candidate = drifted(reference, np.array([0, 0, 0.002, 0, 0]))
    report = run_embedding_regression_tests(np.zeros(0), reference, lambda faces: candidate, max_drift=0.0021)
    assert report.faces == 5
    with pytest.raises(GateFailed) as caught:
        run_embedding_regression_tests(np.zeros(0), reference, candidate, 0.001, [f"{i}.jpg" for i in range(5)])
    assert str(caught.value) == (
        "drift 0.002, 2.0 × the limit 0.001 for the candidate, on 1 of 5 faces; worst: 2.jpg (0.002). "
        "What differs: arcface compare A B"
    )
