"""The gate of a variant in one runtime: no face may drift too far, and decisions on pairs must not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arcface_build.imports.proof import OnCount
from arcface_build.variants.eval_set import FaceSet
from arcface_clients.engines.runtimes import OnnxSession
from arcface_clients.errors import InvalidFaces
from arcface_clients.evidence.accuracy import (
    ChangedDecisions,
    best_threshold,
    changed_decisions,
    pair_scores,
    pairs_from_identities,
)
from arcface_clients.evidence.gate import GateVerdict, judge_embeddings

ACCURACY_LIMITS = {"fp32": 0.001, "fp16": 0.001, "bf16": 0.001, "int8": 0.005}
HELD_BACK, ALL = "held back", "all"
CLIPPED_LIMIT = 0.001  # share of a tensor's values; measured in docs/variants.md
BATCH = 8
_ROUNDING = 1e-9  # two of 72 decisions must count as 2/72 despite rounding


@dataclass(frozen=True)
class VariantVerdict:
    """The verdict on one variant in one runtime.

    Attributes:
        runtime: where it was computed.
        gate: the gate's verdict on its drift.
        decisions: None if identities are unknown or a row is unusable.
        accuracy_limit: how much verification accuracy may change.
        judged_on: the deciding faces: `HELD_BACK`, `ALL` (nothing was fitted), or the origin of other faces.
        searched: the verdict on the faces it was fitted to; None if nothing was fitted.
        clipped: int8 only: tensor → share of its values on the judged faces that its range cuts off.
    """

    runtime: str
    gate: GateVerdict
    decisions: ChangedDecisions | None
    accuracy_limit: float
    judged_on: str = ALL
    searched: GateVerdict | None = None
    clipped: Mapping[str, float] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """Reason for a refusal, without a full stop; empty if it passed."""
        return "; ".join(filter(None, (self.gate.why, self._changed_accuracy(), self._clips())))

    @property
    def passed(self) -> bool:
        """Whether it may be served in this runtime."""
        return not self.why

    @property
    def max_drift(self) -> float:
        """1 − cosine of the worst face."""
        return self.gate.max_drift

    @property
    def mean_drift(self) -> float:
        """1 − mean cosine."""
        return 1 - self.gate.report.mean_cosine if self.gate.report else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The record for a sidecar."""
        told = self.decisions
        return {
            "runtime": self.runtime,
            "passed": self.passed,
            "why": self.why,
            "limit": self.gate.limit,
            "drift": self.gate.report.to_json() if self.gate.report else None,
            "faces_over": self.gate.faces_over,
            "accuracy_reference": told.accuracy_reference if told else None,
            "accuracy": told.accuracy_candidate if told else None,
            "accuracy_limit": self.accuracy_limit,
            "changed_decisions": told.changed if told else None,
            "pairs": told.pairs if told else None,
            "judged_on": self.judged_on,
            "searched": _brief(self.searched) if self.searched else None,
            "clipped": {"limit": CLIPPED_LIMIT, "worst": max(self.clipped.values()), "by_tensor": dict(self.clipped)}
            if self.clipped
            else None,
        }

    def _clips(self) -> str:
        over = {name: share for name, share in self.clipped.items() if not share <= CLIPPED_LIMIT}
        if not over:
            return ""
        worst = max(over, key=lambda name: over[name])
        return (
            f"ranges cut off more than {CLIPPED_LIMIT:.2%} of the values of {len(over)} of {len(self.clipped)} tensors "
            f"({over[worst]:.2%} of {worst}): the calibration faces differ from these"
        )

    def _changed_accuracy(self) -> str:
        told = self.decisions
        if told is None or abs(told.accuracy_candidate - told.accuracy_reference) <= self.accuracy_limit + _ROUNDING:
            return ""
        return (
            f"verification accuracy {told.accuracy_candidate:.2%} against {told.accuracy_reference:.2%} in fp32, "
            f"allowed ±{self.accuracy_limit:.2%}"
        )


def _brief(verdict: GateVerdict) -> dict[str, Any]:
    mean = 1 - verdict.report.mean_cosine if verdict.report else None
    return {"faces": verdict.faces, "limit": verdict.limit, "max_drift": verdict.max_drift, "mean_drift": mean}


def embed_all(
    session: OnnxSession, faces: np.ndarray, progress: OnCount | None = None, batch: int = BATCH
) -> np.ndarray:
    """Embeddings (N,D) float32 of faces uint8 (N,112,112,3), batch by batch."""
    name, parts = session.get_inputs()[0].name, []
    for start in range(0, len(faces), batch):
        parts.append(session.run(None, {name: faces[start : start + batch]})[0])
        if progress:
            progress(min(start + batch, len(faces)), len(faces))
    return np.concatenate(parts)


def judge_variant(
    runtime: str,
    precision: str,
    limits: Mapping[str, float],
    reference: np.ndarray,
    candidate: np.ndarray,
    faces: FaceSet,
) -> VariantVerdict:
    """Verdict on `candidate` against `reference`, both (N,D) embeddings of `faces` in order; every face counts.

    A variant passes if it passes `evidence.gate` and, if identities are known, if verification accuracy at the
    reference's best threshold (users keep theirs when a variant is swapped in) changes by no more than its limit, or by
    two decisions if there are so few pairs that two exceed it.
    """
    gate = judge_embeddings(reference, candidate, precision, limits, faces.names)
    decisions = None
    if gate.report is not None and not gate.report.bad_rows and faces.identities is not None:
        decisions = _decisions(reference, candidate, faces.identities)
    accuracy_limit = ACCURACY_LIMITS[precision]
    return VariantVerdict(
        runtime, gate, decisions, max(accuracy_limit, 2 / decisions.pairs) if decisions else accuracy_limit
    )


def _decisions(reference: np.ndarray, candidate: np.ndarray, identities: np.ndarray) -> ChangedDecisions | None:
    """Changed decisions on all genuine pairs and as many impostors; None unless there are both."""
    try:
        pairs = pairs_from_identities(identities.tolist())
    except InvalidFaces:
        return None
    threshold = best_threshold(pair_scores(reference, pairs), pairs.same)
    return changed_decisions(reference, candidate, pairs, threshold)
