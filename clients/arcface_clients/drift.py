"""Drift: how far candidate embeddings are from the reference's, face by face (1 − cosine)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arcface_clients.errors import InvalidFaces

# Largest 1 − cosine a face may show before an artefact of this precision is refused (config: comparison.max_drift).
DRIFT_LIMITS = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-3, "int8": 1e-2}


@dataclass(frozen=True)
class DriftReport:
    """Figures of `compare_embeddings`; cosines are per face, `worst_face` is an index into the batch."""

    faces: int
    mean_cosine: float
    min_cosine: float
    max_drift: float
    mean_l2: float
    max_l2: float
    worst_face: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def cosine_per_face(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Row-wise cosine of two (N,D) arrays as float64 (N,); computed in float64 because 1 − cosine is near 1e-7.

    Raises:
        InvalidFaces: shapes differ, or a row holds NaN or is all zero.
    """
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if a.ndim != 2 or a.shape != b.shape:
        raise InvalidFaces(f"expected two (N, D) arrays of one shape, got {a.shape} and {b.shape}.")
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise InvalidFaces(f"{bad.size} of {len(a)} embeddings are zero or hold NaN, first at row {bad[0]}.")
    return np.einsum("nd,nd->n", a, b) / norms


def compare_embeddings(reference: np.ndarray, candidate: np.ndarray) -> DriftReport:
    """Drift of `candidate` against `reference`, both float (N,D) with rows in the same order, N ≥ 1."""
    cosine = cosine_per_face(reference, candidate)
    if not len(cosine):
        raise InvalidFaces("cannot compare 0 faces: expected at least one.")
    l2 = np.linalg.norm(np.asarray(reference, np.float64) - np.asarray(candidate, np.float64), axis=1)
    return DriftReport(
        faces=len(cosine),
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        max_drift=float(1 - cosine.min()),
        mean_l2=float(l2.mean()),
        max_l2=float(l2.max()),
        worst_face=int(cosine.argmin()),
    )
