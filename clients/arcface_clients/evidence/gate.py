"""The gate: decides whether an artefact is close enough to the reference to be used. The rule lives only here.

Code that makes, installs or loads an artefact calls one of these functions and raises its own error with the verdict's
message: `judge_embeddings` if it has embeddings, `judge_record` or `judge_sidecar` if it only has a file that records
what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import UNIT_TOLERANCE
from arcface_clients.errors import ConfigError, GateFailed, WrongUse
from arcface_clients.evidence.drift import DRIFT_LIMITS, DriftReport, compare_embeddings, cosine_per_face

_FITTED = "it was judged on the faces it was fitted to. Judge it on others: arcface quantize {} --verify FACES"
_NAMED = 5  # number of worst faces listed in a refusal
_ROUNDING = 1e-5  # a cosine may come out above 1 by less than this


@dataclass(frozen=True)
class GateVerdict:
    """The gate's verdict on one candidate.

    Attributes:
        precision: whose limit was applied.
        limit: largest 1 − cosine allowed for any face.
        max_drift: of the worst face; NaN if nothing could be measured.
        faces: how many were compared.
        why: reason for a refusal, without a full stop; empty if it passed.
        report: all figures; None if shapes did not fit, and for a record.
        faces_over: number of faces beyond the limit, including unusable rows; None for a record.
    """

    precision: str
    limit: float
    max_drift: float
    faces: int
    why: str
    report: DriftReport | None = None
    faces_over: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the candidate may be used."""
        return not self.why


def limit_of(precision: str, limits: Mapping[str, float]) -> float:
    """The limit of a precision.

    Raises:
        ConfigError: there is none.
    """
    if precision not in limits:
        raise ConfigError(f"no drift limit for precision {precision!r}: expected one of {', '.join(limits)}.")
    return limits[precision]


def judge_embeddings(
    reference: Array,
    candidate: Array,
    precision: str,
    limits: Mapping[str, float],
    names: Sequence[str] | None = None,
) -> GateVerdict:
    """Judge a candidate's embeddings of the faces that the reference embedded.

    The verdict is a refusal, not an exception, if a face drifts beyond the limit, if a row is zero, contains NaN or is
    not of unit length, or if the shape differs from the reference's.

    Args:
        reference: float (N,D), N ≥ 1, rows of any length.
        candidate: expected to be float (N,D) with unit rows in the same order.
        precision: of the candidate.
        limits: largest 1 − cosine by precision (configuration: comparison.max_drift).
        names: a path for each face, for the message.

    Raises:
        InvalidFaces: the *reference* is empty, or has a row that is zero or contains NaN.
        ConfigError: there is no limit for this precision.
    """
    limit = limit_of(precision, limits)
    got = np.asarray(candidate)
    if got.shape != np.shape(reference) or got.dtype.kind not in "fiu":
        why = f"it gives {got.dtype} {got.shape} for {len(reference)} faces, expected floats {np.shape(reference)}"
        return GateVerdict(precision, limit, math.nan, len(reference), why)
    report = compare_embeddings(reference, got, names, worst=max(_NAMED, 8))
    usable = np.isfinite(got).all(axis=1) & got.any(axis=1)
    drift = 1 - cosine_per_face(np.asarray(reference)[usable], got[usable])
    over = int((~usable).sum() + (drift > limit).sum())
    why = "; ".join(
        filter(None, (_bad_rows(report), _too_far(report, precision, limit, over), _lengths(report.norms["candidate"])))
    )
    return GateVerdict(precision, limit, report.max_drift, report.faces, why, report, over)


def judge_record(record: object, precision: str, limits: Mapping[str, float]) -> GateVerdict:
    """Judge by a stored drift report (`DriftReport.to_json`), as found in manifests and sidecars.

    Anything missing counts against the artefact: no record, no number, NaN.
    """
    limit = limit_of(precision, limits)
    if not isinstance(record, Mapping):
        return GateVerdict(precision, limit, math.nan, 0, "its drift was never measured")
    drift, faces, bad_rows = (record.get(key) for key in ("max_drift", "faces", "bad_rows"))
    if isinstance(drift, bool) or not isinstance(drift, (int, float)) or not -_ROUNDING <= drift <= 2:
        return GateVerdict(precision, limit, math.nan, 0, f"its record states a drift of {drift}, expected a number")
    why = "" if drift <= limit else f"drift {drift:.3g}, {drift / limit:.1f} × the limit {limit:g} for {precision}"
    if bad_rows:
        why = f"{bad_rows} of its embeddings are zero or contain NaN"
    elif "faces" in record and not (type(faces) is int and faces > 0):
        why = f"its record states {faces} faces, expected at least one"
    elif not why and "norms" in record:
        why = _recorded_lengths(record["norms"])
    return GateVerdict(precision, limit, float(drift), faces if isinstance(faces, int) else 0, why)


def judge_sidecar(sidecar: Mapping[str, Any], limits: Mapping[str, float] | None = None) -> dict[str, GateVerdict]:
    """Judge a variant by its sidecar, for each runtime: it may be served only in runtimes whose verdict is a pass.

    Older sidecars recorded drift on the very faces used to choose ranges and layers. Such a variant is not served until
    it has been judged on other faces; bf16 is exempt, because nothing in it is fitted.

    Args:
        sidecar: what `arcface quantize` wrote beside the variant.
        limits: largest drift by precision; None applies the limit recorded in the sidecar.
    """
    precision = str(sidecar.get("precision"))
    verdicts: dict[str, GateVerdict] = {}
    for gate in sidecar.get("gates", ()):
        if limits is None:
            verdict = judge_record(gate.get("drift"), precision, {precision: gate.get("limit", math.nan)})
        else:
            verdict = judge_record(gate.get("drift"), precision, limits)
        if verdict.passed and not (gate.get("passed") is True and sidecar.get("passed") is True):
            verdict = replace(verdict, why=gate.get("why") or "its gate refused it")
        if verdict.passed and precision != "bf16" and "judged_on" not in gate:
            verdict = replace(verdict, why=_FITTED.format(sidecar.get("name", "NAME")))
        known = verdicts.get(gate["runtime"])
        if known is None or known.passed:  # of two verdicts in one runtime a refusal counts
            verdicts[gate["runtime"]] = verdict
    return verdicts


def run_embedding_regression_tests(
    eval_faces: Array,
    reference: Callable[[Array], Array] | Any = None,
    candidate: Callable[[Array], Array] | Any = None,
    max_drift: float = DRIFT_LIMITS["fp16"],
    names: Sequence[str] | None = None,
    *,
    pytorch_embedder: Callable[[Array], Array] | Any = None,
    tensorrt_embedder: Callable[[Array], Array] | Any = None,
) -> DriftReport:
    """Embed the same faces with both sides and require min cosine ≥ 1 − max_drift.

    Args:
        eval_faces: uint8 (N,112,112,3) BGR, N ≥ 1.
        reference: an engine (anything with `encode`), a function from faces to embeddings, or embeddings (N,D).
        candidate: the same.
        max_drift: largest 1 − cosine allowed for any face.
        names: a path for each face, for the message.
        pytorch_embedder: former name of `reference`.
        tensorrt_embedder: former name of `candidate`.

    Raises:
        GateFailed: a face drifted further, or an embedding is unusable; the message names the worst faces.
        WrongUse: a side is missing, or given under both of its names.
    """
    asked = "the candidate"
    expected = _one_of(reference=reference, pytorch_embedder=pytorch_embedder)
    got = _one_of(candidate=candidate, tensorrt_embedder=tensorrt_embedder)
    verdict = judge_embeddings(_embed(expected, eval_faces), _embed(got, eval_faces), asked, {asked: max_drift}, names)
    if verdict.report is None or not verdict.passed:
        raise GateFailed(f"{verdict.why}. What differs: arcface compare A B")
    return verdict.report


def _one_of(**sides: Any) -> Any:
    given = [side for side in sides.values() if side is not None]
    if len(given) != 1:
        raise WrongUse(f"expected {' or '.join(sides)}, got {'both' if given else 'neither'}.")
    return given[0]


def _embed(side: Any, faces: Array) -> Array:
    if isinstance(side, np.ndarray):
        return side
    embedded: Array = side.encode(faces) if hasattr(side, "encode") else side(faces)
    return embedded


def _bad_rows(report: DriftReport) -> str:
    return f"{report.bad_rows} of {report.faces} embeddings are zero or contain NaN" if report.bad_rows else ""


def _too_far(report: DriftReport, precision: str, limit: float, over: int) -> str:
    if report.max_drift <= limit:
        return ""
    worst = [f"{w.name or f'face {w.index}'} ({1 - w.cosine:.3g})" for w in report.worst_faces if 1 - w.cosine > limit]
    return (
        f"drift {report.max_drift:.3g}, {report.max_drift / limit:.1f} × the limit {limit:g} for {precision}, on "
        f"{over} of {report.faces} faces; worst: {', '.join(worst[:_NAMED])}"
    )


def _recorded_lengths(norms: object) -> str:
    of_candidate = norms.get("candidate") if isinstance(norms, Mapping) else None
    ends: dict[str, float] = {}
    for end in ("min", "max"):
        value = of_candidate.get(end) if isinstance(of_candidate, Mapping) else None
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"its record states lengths of {norms}, expected numbers"
        ends[end] = value
    return _lengths(ends)


def _lengths(norms: Mapping[str, float]) -> str:
    """Why the lengths are wrong: callers use the dot product as cosine, so a wrong length gives a wrong score."""
    shortest, longest = norms["min"], norms["max"]
    if longest == 0 or max(abs(shortest**2 - 1), abs(longest**2 - 1)) <= UNIT_TOLERANCE:  # 0: no row is usable
        return ""
    return f"embeddings of length {shortest:.5g} to {longest:.5g}, expected 1"
