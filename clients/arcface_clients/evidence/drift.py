"""Drift: how far a candidate's embeddings are from the reference's, face by face (1 − cosine)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.errors import InvalidFaces

# Largest 1 − cosine a face may show before an artefact of this precision is refused (config: comparison.max_drift).
DRIFT_LIMITS = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-3, "int8": 1e-2}
# What a good backend reaches, and where a warning starts (config: comparison.{mean_cosine,min_cosine,l2_mean}).
TARGETS = {"mean_cosine": (0.995, 0.990), "min_cosine": (0.990, 0.980), "l2_mean": (0.05, 0.10)}
PERCENTILES = (0.1, 1, 5, 25, 50)
# 1 − cosine from float32 rounding to "another face", four bins per decade.
HISTOGRAM_EDGES = (0.0, *(float(f"{10 ** (exponent / 4):.6g}") for exponent in range(-32, 1)), 2.0)


@dataclass(frozen=True)
class WorstFace:
    """One of the faces that drifted most; `name` is its path if paths were given."""

    index: int
    name: str | None
    cosine: float
    l2: float


@dataclass(frozen=True)
class DriftReport:
    """Result of `compare_embeddings`; cosines are per face, `worst_face` is an index into the batch.

    A candidate row that is zero or contains NaN counts as cosine 0 and is counted in `bad_rows`. L2 distances use the
    rows as given, so a candidate that is not of unit length shows up there and in `norms`.
    """

    faces: int
    mean_cosine: float
    min_cosine: float
    max_drift: float
    mean_l2: float
    max_l2: float
    worst_face: int
    bad_rows: int = 0
    percentiles: Mapping[str, float] = field(default_factory=dict)  # "1" → the cosine that 1 % of the faces are below
    worst_faces: tuple[WorstFace, ...] = ()
    histogram: Mapping[str, Sequence[float]] = field(default_factory=dict)  # edges of 1 − cosine, counts between them
    norms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # reference, candidate → min, mean, max

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)

    @property
    def mean_cosine_sim(self) -> float:
        """Former name of `mean_cosine`."""
        return self.mean_cosine

    @property
    def min_cosine_sim(self) -> float:
        """Former name of `min_cosine`."""
        return self.min_cosine

    @property
    def max_drift_face_idx(self) -> int:
        """Former name of `worst_face`."""
        return self.worst_face

    @property
    def drift_histogram(self) -> Mapping[str, Sequence[float]]:
        """Former name of `histogram`."""
        return self.histogram


@dataclass(frozen=True)
class TargetCheck:
    """One figure and its target: `met`, `missed` (between target and warning) or `warning` (beyond both)."""

    figure: str
    value: float
    target: float
    warn: float
    status: str

    def __str__(self) -> str:
        """The result in words, with its figures."""
        sign = "≤" if self.figure == "l2_mean" else "≥"
        return f"{self.figure} {self.value:.6f}: {self.status} (target {sign} {self.target:g}, warning {self.warn:g})"


def cosine_per_face(reference: Array, candidate: Array) -> Array:
    """Row-wise cosine of two (N,D) arrays as float64 (N,); computed in float64 because 1 − cosine can be near 1e-7.

    Raises:
        InvalidFaces: shapes differ, or a row contains NaN or is all zero.
    """
    a, b = _same_shape(reference, candidate)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise InvalidFaces(f"{bad.size} of {len(a)} embeddings are zero or contain NaN, first at row {bad[0]}.")
    cosines: Array = np.einsum("nd,nd->n", a, b) / norms
    return cosines


def compare_embeddings(
    reference: Array, candidate: Array, names: Sequence[str] | None = None, worst: int = 8
) -> DriftReport:
    """Drift of `candidate` against `reference`, both float (N,D) with rows in the same order, N ≥ 1.

    Args:
        reference: the correct embeddings.
        candidate: the embeddings to judge; its rows may be bad (zero, NaN), the reference's may not.
        names: a path for each face, for the list of worst faces.
        worst: length of that list.

    Raises:
        InvalidFaces: shapes differ, there are no faces, or a row of the reference is zero or contains NaN.
    """
    a, b = _same_shape(reference, candidate)
    if not len(a):
        raise InvalidFaces("cannot compare 0 faces: expected at least one.")
    if names is not None and len(names) != len(a):
        raise InvalidFaces(f"expected a name for each of {len(a)} faces, got {len(names)}.")
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    good = np.isfinite(norm_b) & (norm_b > 0)
    cosine = np.zeros(len(a))
    cosine[good] = cosine_per_face(a, np.where(good[:, None], b, a))[good]
    l2 = np.linalg.norm(a - np.where(good[:, None], b, 0), axis=1)
    drift = np.clip(1 - cosine, 0, 2)
    order = np.argsort(cosine, kind="stable")
    listed = [
        WorstFace(int(i), names[i] if names is not None else None, float(cosine[i]), float(l2[i]))
        for i in order[:worst]
    ]
    return DriftReport(
        faces=len(cosine),
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        max_drift=float(1 - cosine.min()),
        mean_l2=float(l2.mean()),
        max_l2=float(l2.max()),
        worst_face=int(order[0]),
        bad_rows=int((~good).sum()),
        percentiles={f"{p:g}": float(np.percentile(cosine, p)) for p in PERCENTILES},
        worst_faces=tuple(listed),
        histogram={"edges": list(HISTOGRAM_EDGES), "counts": np.histogram(drift, HISTOGRAM_EDGES)[0].tolist()},
        norms={"reference": _range(norm_a), "candidate": _range(norm_b[good])},
    )


def check_targets(report: DriftReport, targets: Mapping[str, tuple[float, float]] = TARGETS) -> list[TargetCheck]:
    """Compare each figure with its (target, warning): mean and min cosine must be above, mean L2 below.

    Targets say how good a backend is; the gate decides whether it may be used (`evidence.gate`).
    """
    values = {"mean_cosine": report.mean_cosine, "min_cosine": report.min_cosine, "l2_mean": report.mean_l2}
    checks = []
    for figure, (target, warn) in targets.items():
        sign = -1 if figure == "l2_mean" else 1
        value = values[figure]
        status = "met" if sign * value >= sign * target else "missed" if sign * value >= sign * warn else "warning"
        checks.append(TargetCheck(figure, value, target, warn, status))
    return checks


def _same_shape(reference: Array, candidate: Array) -> tuple[Array, Array]:
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if a.ndim != 2 or a.shape != b.shape:
        raise InvalidFaces(f"expected two (N, D) arrays of the same shape, got {a.shape} and {b.shape}.")
    return a, b


def _range(values: Array) -> dict[str, float]:
    if not len(values):
        return {"min": 0.0, "mean": 0.0, "max": 0.0}
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}
