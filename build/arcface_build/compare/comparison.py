"""Compares two open sides on the same faces; the report is one JSON object (docs/reports.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.compare.sides import Side
from arcface_clients.errors import ContractMismatch, WrongUse
from arcface_clients.evidence.accuracy import Pairs, changed_decisions, measure_accuracy
from arcface_clients.evidence.diagnose import diagnose, diagnose_embeddings
from arcface_clients.evidence.drift import (
    TARGETS,
    DriftReport,
    TargetCheck,
    check_targets,
    compare_embeddings,
    cosine_per_face,
)

FORMAT = 1
ACROSS_CONTRACTS = (
    "A and B have different contracts: their embeddings must not be mixed or searched together, however similar."
)
_FACES_OF_A = 8
_NETWORK_OF_A = 0.95  # int8 stays above this


@dataclass(frozen=True)
class Faces:
    """The faces to embed: uint8 (N,112,112,3) BGR, or None if both sides are saved; their names, or None."""

    pixels: np.ndarray | None
    names: tuple[str, ...] | None

    def sample(self, count: int | None) -> Faces:
        """`count` faces, evenly spaced; all of them if `count` is None or too large."""
        total = len(self.pixels) if self.pixels is not None else len(self.names or ())
        if not count or count >= total:
            return self
        rows = np.linspace(0, total - 1, count).astype(int)
        return Faces(
            self.pixels[rows] if self.pixels is not None else None,
            tuple(self.names[i] for i in rows) if self.names else None,
        )


@dataclass(frozen=True)
class CompareResult:
    """Result of `compare_sides`; `report` is the JSON report."""

    report: dict[str, Any]
    drift: DriftReport
    verdicts: list[TargetCheck]
    reference: np.ndarray
    candidate: np.ndarray

    @property
    def passed(self) -> bool:
        """Whether drift is within its limit and no figure is beyond its warning."""
        return bool(self.report["passed"])


def compare_sides(
    a: Side,
    b: Side,
    faces: Faces,
    max_drift: float,
    pairs: Pairs | None = None,
    threshold: float | None = None,
    targets: Mapping[str, tuple[float, float]] = TARGETS,
    across_contracts: bool = False,
) -> CompareResult:
    """Embed the faces with both sides and compare; `a` is the ground truth.

    Args:
        a: the reference.
        b: the candidate.
        faces: what to embed; saved embeddings are matched to them by name if both have names.
        max_drift: largest allowed 1 − cosine of a face.
        pairs: labelled pairs of rows, for accuracy.
        threshold: cosine from which a pair counts as one person; None uses A's best (ten-fold).
        targets: (target, warning) for each figure.
        across_contracts: compare even if the contracts are known to differ; the report says so.

    Raises:
        ContractMismatch: both sides know their contract, the two differ, and `across_contracts` is false.
        WrongUse: saved embeddings do not fit the faces.
    """
    across = differ(a, b)
    if not across_contracts:
        check_contracts(a, b)
    reference, candidate = embeddings_of(a, faces), embeddings_of(b, faces)
    if reference.shape[1] != candidate.shape[1]:
        raise WrongUse(
            f"{a.label} holds embeddings of {reference.shape[1]} numbers, {b.label} of {candidate.shape[1]}: they come "
            "from different models and cannot be compared. Embed again with one of them: arcface embed"
        )
    drift = compare_embeddings(reference, candidate, [_key(name) for name in faces.names] if faces.names else None)
    verdicts = check_targets(drift, targets)
    gate = drift.max_drift <= max_drift
    report: dict[str, Any] = {
        "format": FORMAT,
        "kind": "compare",
        "a": _about(a),
        "b": _about(b),
        "faces": drift.faces,
        "drift": drift.to_json(),
        "gate": {"max_drift": max_drift, "passed": gate},
        "targets": [asdict(verdict) for verdict in verdicts],
        "accuracy": _accuracy(reference, candidate, pairs, threshold) if pairs is not None else None,
        "across_contracts": across,
        "findings": [f.to_json() for f in diagnose_embeddings(reference, candidate, sized=not gate)],
        "not_explained": None,
        "layers": None,
        "passed": gate and all(verdict.status != "warning" for verdict in verdicts),
    }
    return CompareResult(report, drift, verdicts, reference, candidate)


def check_contracts(a: Side, b: Side) -> None:
    """Check that both sides have the same contract, or that one does not know its own.

    Raises:
        ContractMismatch: the two differ.
    """
    if differ(a, b):
        ids = [(side.contract_id or "")[:12] for side in (a, b)]
        raise ContractMismatch(
            f"{a.label} has contract {ids[0]}…, {b.label} has {ids[1]}…: their embeddings come from different weights "
            "or preprocessing and cannot be compared. Embed again with one of them, or see how much they differ "
            "anyway: --across-contracts"
        )


def differ(a: Side, b: Side) -> bool:
    """Whether both sides know their contract and the two differ."""
    return bool(a.contract_id and b.contract_id and a.contract_id != b.contract_id)


def embeddings_of(side: Side, faces: Faces) -> np.ndarray:
    """A side's embeddings of the faces, in the same order."""
    if side.saved is None:
        if faces.pixels is None or side.encode is None:
            raise WrongUse(f"{side.label} needs faces to embed, and there are none: give crops with --faces FOLDER.")
        return side.encode(faces.pixels)
    if side.names and faces.names:
        rows = {_key(name): row for row, name in enumerate(side.names)}
        absent = [name for name in faces.names if _key(name) not in rows]
        if absent:
            raise WrongUse(
                f"{side.label} has no embedding of {absent[0]} ({len(absent)} of {len(faces.names)} are missing). "
                "Compare on the faces that were embedded: arcface compare … --faces THE_SAME_FOLDER"
            )
        return side.saved[[rows[_key(name)] for name in faces.names]]
    expected = len(faces.pixels) if faces.pixels is not None else len(faces.names or side.saved)
    if len(side.saved) != expected:
        raise WrongUse(f"{side.label} has {len(side.saved)} embeddings without names: expected {expected}.")
    return side.saved


def explain(result: CompareResult, b: Side, faces: Faces, source: Path | None) -> None:
    """Add to the report the faults that explain the candidate, tried on A's source ONNX, or why they were not tried."""
    from arcface_build.compare.reference import reference_network

    findings, why = None, None
    if faces.pixels is None or source is None:
        absent = ["the faces: --faces FOLDER"] if faces.pixels is None else []
        absent += ["the source ONNX of A: --source models/NAME/source.onnx"] if source is None else []
        told = ", and ".join(absent)
        why = f"only the embeddings were checked; faults of the input need the network too. Give {told}"
    else:
        network, preprocessing = reference_network(source)
        own = network(preprocessing.apply(faces.pixels[:_FACES_OF_A]))
        expected = result.reference[:_FACES_OF_A]
        if own.shape == expected.shape and cosine_per_face(own, expected).min() > _NETWORK_OF_A:
            findings = diagnose(faces.pixels, result.candidate, network, preprocessing, b.encode)
        else:
            why = f"{source.name} is not the network of A, so faults of the input were not tried. Give A's: --source"
    if findings is None:
        findings = diagnose_embeddings(result.reference, result.candidate)
    result.report["findings"] = [finding.to_json() for finding in findings]
    result.report["not_explained"] = why


def _accuracy(reference: np.ndarray, candidate: np.ndarray, pairs: Pairs, threshold: float | None) -> dict[str, Any]:
    before, after = measure_accuracy(reference, pairs), measure_accuracy(candidate, pairs)
    decided_at = before.fold_threshold if threshold is None else threshold
    return {
        "a": before.to_json(),
        "b": after.to_json(),
        "changed": changed_decisions(reference, candidate, pairs, decided_at).to_json(),
    }


def _about(side: Side) -> dict[str, Any]:
    return {"label": side.label, "precision": side.precision, "contract_id": side.contract_id}


def _key(name: str) -> str:
    """The last two parts of a path: person and file, whatever folder they are in."""
    return "/".join(Path(name).parts[-2:])


def names_of(sides: Sequence[Side]) -> tuple[str, ...] | None:
    """Names common to all saved sides with names, in the order of the first."""
    named = [side for side in sides if side.saved is not None and side.names]
    if not named:
        return None
    keys = [{_key(name) for name in side.names or ()} for side in named[1:]]
    return tuple(name for name in named[0].names or () if all(_key(name) in other for other in keys))
