"""The gate: embeddings of the fp32 serving ONNX and of a variant in; a verdict, and words for a refusal, out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arcface_build.variants.eval_set import FaceSet
from arcface_clients.engines.runtimes import OnnxSession
from arcface_clients.evidence.drift import DriftReport, compare_embeddings, cosine_per_face

ACCURACY_LIMITS = {"fp32": 0.001, "fp16": 0.001, "bf16": 0.001, "int8": 0.005}
BATCH = 8
WORST = 5
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verdict:
    """One variant in one runtime against its limits; accuracies are None where identities are unknown."""

    runtime: str
    limit: float
    drift: DriftReport
    faces_over: int
    worst: list[dict[str, Any]]
    accuracy_reference: float | None
    accuracy: float | None
    accuracy_limit: float
    changed_decisions: int | None
    pairs: int | None
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)

    def summary(self) -> str:
        """One line: passed or by how much not."""
        line = f"{self.runtime}: drift {self.drift.max_drift:.3g} of {self.limit:g} allowed, mean {self.mean_drift:.3g}"
        if self.accuracy is not None and self.accuracy_reference is not None:
            line += f", accuracy {self.accuracy:.2%} ({self.accuracy - self.accuracy_reference:+.2%})"
        return f"{'passed' if self.passed else 'REFUSED'} in {line}"

    @property
    def mean_drift(self) -> float:
        """1 − mean cosine."""
        return 1 - self.drift.mean_cosine


def embed_all(
    session: OnnxSession, faces: np.ndarray, progress: Progress | None = None, batch: int = BATCH
) -> np.ndarray:
    """Embeddings (N,D) float32 of faces uint8 (N,112,112,3), batch by batch."""
    name, parts = session.get_inputs()[0].name, []
    for start in range(0, len(faces), batch):
        parts.append(session.run(None, {name: faces[start : start + batch]})[0])
        if progress:
            progress(min(start + batch, len(faces)), len(faces))
    return np.concatenate(parts)


def judge(
    runtime: str, precision: str, limit: float, reference: np.ndarray, candidate: np.ndarray, faces: FaceSet
) -> Verdict:
    """Verdict on `candidate` against `reference`, both (N,D) embeddings of `faces` in order; every face counts.

    A variant passes when no face drifts by more than `limit` (1 − cosine) and, where identities are known, when
    verification accuracy changes by no more than its limit (or by two decisions, where there are so few pairs that two
    are more).
    """
    accuracy_limit = ACCURACY_LIMITS[precision]
    finite = np.isfinite(candidate).all(axis=1) & (np.linalg.norm(candidate, axis=1) > 0)
    usable = np.where(finite[:, None], candidate, -reference)  # NaN counts as the worst that can be
    drift = compare_embeddings(reference, usable)
    per_face = 1 - cosine_per_face(reference, usable)
    worst = [
        {"face": int(i), "name": faces.names[i], "drift": float(per_face[i])} for i in np.argsort(-per_face)[:WORST]
    ]
    before = after = changed = pairs = None
    passed = bool(finite.all() and drift.max_drift <= limit)
    if faces.identities is not None:
        left, right, same = _pairs(faces.identities)
        if same.any() and not same.all():
            scores = [np.einsum("nd,nd->n", e[left], e[right]) for e in (reference, usable)]
            threshold, before = _best_threshold(scores[0], same)
            _, after = _best_threshold(scores[1], same)
            changed = int(((scores[0] >= threshold) != (scores[1] >= threshold)).sum())
            pairs = len(same)
            accuracy_limit = max(accuracy_limit, 2 / pairs)
            passed = passed and abs(after - before) <= accuracy_limit
    over = int((per_face > limit).sum())
    return Verdict(runtime, limit, drift, over, worst, before, after, accuracy_limit, changed, pairs, passed)


def refusal(name: str, precision: str, verdict: Verdict) -> str:
    """The message for a variant that failed: by how much, which faces, what to try."""
    lines = []
    if verdict.drift.max_drift > verdict.limit:
        worst = ", ".join(f"{w['name']} ({w['drift']:.3g})" for w in verdict.worst)
        lines.append(
            f"{precision} of {name} refused in {verdict.runtime}: drift {verdict.drift.max_drift:.3g}, "
            f"{verdict.drift.max_drift / verdict.limit:.1f} × the {verdict.limit:g} that are allowed, on "
            f"{verdict.faces_over} of {verdict.drift.faces} faces; worst: {worst}."
        )
    if verdict.accuracy is not None and abs(verdict.accuracy - verdict.accuracy_reference) > verdict.accuracy_limit:
        lines.append(
            f"{precision} of {name} refused in {verdict.runtime}: verification accuracy {verdict.accuracy:.2%} against "
            f"{verdict.accuracy_reference:.2%} in fp32, allowed ±{verdict.accuracy_limit:.2%}."
        )
    if not lines:
        lines.append(f"{precision} of {name} refused in {verdict.runtime}: it answers NaN or zeros.")
    return " ".join(lines)


def _pairs(identities: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All genuine pairs and, seeded, as many impostor pairs: indices left, right and bool same."""
    left, right = np.triu_indices(len(identities), 1)
    same = identities[left] == identities[right]
    genuine, impostor = np.flatnonzero(same), np.flatnonzero(~same)
    impostor = np.random.default_rng(seed).permutation(impostor)[: len(genuine)]
    chosen = np.concatenate([genuine, impostor])
    return left[chosen], right[chosen], same[chosen]


def _best_threshold(scores: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """The cosine threshold with most right decisions, and their share."""
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(same[order]) + (~same).sum() - np.cumsum(~same[order])
    best = int(np.argmax(right))
    return float(scores[order[best]]), float(right[best] / len(same))
