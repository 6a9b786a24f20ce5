"""Measures drift, changed decisions and batch invariance for each combination of backend and batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.compare.comparison import Faces, check_contracts
from arcface_build.compare.sides import Side
from arcface_clients.errors import WrongUse
from arcface_clients.evidence.accuracy import Pairs, changed_decisions, measure_accuracy
from arcface_clients.evidence.drift import compare_embeddings, cosine_per_face

FORMAT = 1
_OF_LIMIT = 0.1  # a row alone and in a batch may differ by this share of its precision's drift limit …
_AT_LEAST = 1e-5  # … or by this, whichever is more


def parity_matrix(
    reference: Side,
    open_candidates: Sequence[Callable[[], AbstractContextManager[Side]]],
    faces: Faces,
    batches: Sequence[int],
    limits: Mapping[str, float],
    pairs: Pairs | None = None,
    threshold: float | None = None,
    progress: Callable[[str], None] = lambda told: None,
) -> dict[str, Any]:
    """Compare every candidate at every batch size with the reference; returns a JSON object (docs/reports.md).

    Args:
        reference: the ground truth.
        open_candidates: each opens one candidate; only one is open at a time, to save memory.
        faces: the faces to embed.
        batches: faces per call; 1 is always measured, since batches are compared with it.
        limits: largest 1 − cosine by precision.
        pairs: labelled pairs, for changed decisions.
        threshold: cosine from which a pair is one person; None uses the reference's best.
        progress: called before each combination.
    """
    progress(f"{reference.label}, the reference")
    pixels = faces.pixels
    if pixels is None:
        raise WrongUse("a matrix needs faces to embed, and there are none: give crops with --faces FOLDER.")
    expected = _encoder(reference)(pixels)
    if pairs is not None and threshold is None:
        threshold = measure_accuracy(expected, pairs, resamples=0).fold_threshold
    rows: list[dict[str, Any]] = []
    for opened in open_candidates:
        with opened() as side:
            check_contracts(reference, side)
            encode = _encoder(side)
            limit = limits.get(side.precision, limits["fp32"])
            alone: np.ndarray | None = None
            for batch in sorted({1, *batches}):
                progress(f"{side.label} {side.precision}, batch {batch}")
                got = np.concatenate([encode(pixels[i : i + batch]) for i in range(0, len(pixels), batch)])
                alone = got if alone is None else alone
                rows.append(_row(side, batch, expected, got, alone, limit, pairs, threshold))
    return {
        "format": FORMAT,
        "kind": "matrix",
        "reference": reference.label,
        "contract_id": reference.contract_id,
        "faces": len(expected),
        "pairs": len(pairs.same) if pairs is not None else 0,
        "threshold": threshold,
        "rows": rows,
        "passed": all(row["passed"] for row in rows),
    }


def _encoder(side: Side) -> Callable[[np.ndarray], np.ndarray]:
    if side.encode is None:
        raise WrongUse(f"{side.label} is saved embeddings: a matrix needs an engine, a server, an ONNX file or a plan.")
    return side.encode


def _row(
    side: Side,
    batch: int,
    expected: np.ndarray,
    got: np.ndarray,
    alone: np.ndarray,
    limit: float,
    pairs: Pairs | None,
    threshold: float | None,
) -> dict[str, Any]:
    drift = compare_embeddings(expected, got)
    changed = (
        changed_decisions(expected, got, pairs, threshold) if pairs is not None and threshold is not None else None
    )
    difference = max(0.0, float((1 - cosine_per_face(alone, got)).max())) if drift.bad_rows == 0 else 1.0
    allowed = max(_AT_LEAST, _OF_LIMIT * limit)
    return {
        "backend": side.label,
        "precision": side.precision,
        "batch": batch,
        "mean_cosine": drift.mean_cosine,
        "min_cosine": drift.min_cosine,
        "max_drift": limit,
        "changed": changed.changed if changed else None,
        "accuracy": changed.accuracy_candidate if changed else None,
        "batch_difference": difference,
        "batch_difference_allowed": allowed,
        "passed": drift.max_drift <= limit and difference <= allowed,
    }


def files_of(folder: Path) -> list[str]:
    """The serving ONNX of an imported model and its variants; refused variants have another suffix."""
    return [str(folder / "serving.onnx"), *(str(path) for path in sorted((folder / "variants").glob("*.onnx")))]
