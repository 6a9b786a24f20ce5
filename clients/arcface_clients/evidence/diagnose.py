"""Explains in words why a candidate's embeddings differ from the reference's.

Each hypothesis is tried on the reference: its input is deliberately prepared wrongly, and if that reproduces the
candidate (drift falls to a fraction), the candidate has that fault. This needs only the candidate's embeddings; if the
candidate can also be called, the test covers whether a face's embedding depends on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import Preprocessing
from arcface_clients.errors import InvalidFaces
from arcface_clients.evidence.drift import cosine_per_face
from arcface_clients.evidence.hypotheses import Hypothesis, crop_faults, exact_faults, moved, stretched_faults
from arcface_clients.faces.check import check_faces

NOISE = 1e-6  # float32 networks on two runtimes differ by less
_EXPLAINED = 0.1  # a preprocessing fault must leave less than this share of the drift
_EXPLAINED_BY_CROP = 0.35  # a shifted crop lacks the pixels beyond its border, so it cannot be reproduced exactly
_EXPLAINED_EACH = 0.5  # picking the best of many shifts for each face flatters the hypothesis
_CROP_DRIFT = 1e-3  # a crop shifted by one pixel drifts further than this
_FACES = 6  # enough to tell hypotheses apart
_FACES_FOR_CROPS = 4  # of these; there are many crops to try
_EXPLAINED_BY_STRETCH = 0.75  # no box is like another; counted on faces that did not choose the hypothesis
_SAME = 1e-4  # below this two embeddings are called the same
_COARSER = 0.05  # lossy numbers or pictures drift up to here: int8 0.01, JPEG of quality 40 0.03
_RELATED = 0.05  # a face's embeddings are nearer to each other than to other faces' by this cosine: one network
_SAME_FACE = 0.95
_FLIPPED = 0.1
_THE_OTHER_FACE = 0.6  # this near to another face, and this much nearer than to its own: it is the other's

Network = Callable[[Array], Array]
"""The reference without preprocessing: float32 (N,3,112,112) network input → float (N,D), of any length."""


@dataclass(frozen=True)
class Finding:
    """One fault: a short name, a sentence with the evidence, and the affected rows (empty: all)."""

    fault: str
    sentence: str
    rows: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def diagnose(
    faces: Array,
    candidate: Array,
    network: Network,
    preprocessing: Preprocessing,
    encode: Callable[[Array], Array] | None = None,
    batch_tolerance: float = 1e-5,
) -> list[Finding]:
    """Faults that explain a candidate's embeddings, most certain first; empty if there is nothing to explain.

    Args:
        faces: what was embedded, uint8 (N,112,112,3) BGR.
        candidate: float (N,D), as the candidate gave them.
        network: the reference network.
        preprocessing: what the network was trained with.
        encode: the candidate itself, if it can be called: faces → embeddings.
        batch_tolerance: largest 1 − cosine between a row alone and in a batch.

    Raises:
        InvalidFaces: counts differ, or the candidate's rows are all bad.
    """
    faces, candidate = check_faces(faces), np.asarray(candidate, np.float64)
    if candidate.ndim != 2 or len(candidate) != len(faces) or not len(faces):
        raise InvalidFaces(f"expected an embedding for each of {len(faces)} faces, got {candidate.shape}.")
    reference = network(preprocessing.apply(faces))
    findings, rest = _without_network(reference, candidate)
    if encode is not None:
        mixed = list(_batch_dependence(faces, encode, batch_tolerance))
        findings += mixed
        if mixed:
            return findings
    if not rest.size:
        return findings
    drift = 1 - cosine_per_face(reference[rest], candidate[rest])
    if np.median(drift) > NOISE:
        rows = rest[:: max(1, len(rest) // _FACES)][:_FACES]
        found = _preprocessing_fault(faces[rows], candidate[rows], network, preprocessing)
        findings.append(found or _size(reference[rest], candidate[rest]))
    return findings


def diagnose_embeddings(reference: Array, candidate: Array, sized: bool = True) -> list[Finding]:
    """What two sets of embeddings (N,D) of the same faces tell without the network; what only it can tell is left open.

    Bad rows, lengths, flipped signs, places of rows; and where `sized`, what the drift that is left can be by its size.

    Raises:
        InvalidFaces: shapes differ, or a row of the reference is bad.
    """
    reference, candidate = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    findings, rest = _without_network(reference, candidate)
    if sized and rest.size and np.median(1 - cosine_per_face(reference[rest], candidate[rest])) > NOISE:
        findings.append(_size(reference[rest], candidate[rest]))
    return findings


def _without_network(reference: Array, candidate: Array) -> tuple[list[Finding], Array]:
    """Findings, and the rows whose drift they leave unexplained."""
    if reference.shape != candidate.shape:
        raise InvalidFaces(
            f"expected embeddings {reference.shape}, as the reference gives them, got {candidate.shape}."
        )
    norms = np.linalg.norm(candidate, axis=1)
    usable = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    findings = [*_bad_rows(norms), *_not_normalised(norms[usable])]
    if not usable.size:
        return findings, usable
    unit, drift = _unit(reference), 1 - cosine_per_face(reference[usable], candidate[usable])
    if np.median(drift) > 2 - _FLIPPED:
        return [
            *findings,
            Finding(
                "sign flipped",
                f"The signs are flipped: each embedding is the reference's times −1 (mean cosine "
                f"{1 - drift.mean():.4f}). Negate the output.",
            ),
        ], usable[:0]
    moved_rows, stray = _misplaced(unit, _unit(candidate[usable]), usable, drift)
    return findings + moved_rows, usable[~np.isin(usable, stray)]


def _size(reference: Array, candidate: Array) -> Finding:
    """The finding where nothing explains the drift: which of the three it can be, by how much there is."""
    similar = _unit(candidate) @ _unit(reference).T
    own = similar.diagonal()
    count = len(own)
    foreign = (similar.sum() - own.sum()) / (count * (count - 1)) if count > 1 else 0.0
    median, largest = float(1 - np.median(own)), float(1 - own.min())
    told = f"(1 − cosine: median {median:.1e}, largest {largest:.1e})"
    nearer = float(own.mean() - foreign)
    if nearer < max(_RELATED, 4 * float(own.std()) / np.sqrt(count)):
        return Finding(
            "another network",
            f"The embeddings have nothing to do with the reference's: a face's cosine to itself is {own.mean():.2f}, "
            f"to other faces {foreign:.2f}. Another network, or pictures of other faces.",
        )
    if median < _CROP_DRIFT:
        return Finding(
            "weights or precision",
            f"A small drift on all faces {told}, and no fault that explains it: the weights or the precision "
            "differ. Find the layer: arcface compare A.onnx B.onnx --layers",
        )
    if median < _COARSER:
        return Finding(
            "same network, coarser numbers",
            f"The same network, less exactly {told}: every face stays by far nearest to itself and no changed input "
            "was recognised. A low precision (int8), lossy pictures (JPEG) or averaged views do this.",
        )
    return Finding(
        "same network, changed input",
        f"The same network on changed input {told}: faces stay nearer to themselves than to others "
        f"(cosine {own.mean():.2f} against {foreign:.2f}), but how the pictures were changed was not recognised. "
        "Compare the crops: size, alignment, blur, heavy compression.",
    )


def _bad_rows(norms: Array) -> Iterator[Finding]:
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        yield Finding(
            "bad rows",
            f"{bad.size} of {len(norms)} embeddings are zero or contain NaN, first at row {bad[0]}.",
            tuple(bad.tolist()),
        )


def _not_normalised(norms: Array) -> Iterator[Finding]:
    if norms.size and np.abs(norms - 1).max() > 1e-3:
        yield Finding(
            "not L2-normalised",
            f"The embeddings are not L2-normalised: lengths {norms.min():.4g}–{norms.max():.4g}, expected 1. "
            "Divide each by its length.",
        )


def _batch_dependence(faces: Array, encode: Callable[[Array], Array], tolerance: float) -> Iterator[Finding]:
    """Compare a face embedded alone with the same face among hostile neighbours (black, white, noise)."""
    few = faces[:4]
    noise = np.random.default_rng(0).integers(0, 256, few.shape[1:], np.uint8)
    hostile = np.stack([np.zeros_like(few[0]), np.full_like(few[0], 255), noise])
    alone = np.concatenate([encode(face[None]) for face in few])
    among = encode(np.concatenate([hostile, few, hostile[::-1]]))[3 : 3 + len(few)]
    drift = 1 - cosine_per_face(alone, among)
    if drift.max() > tolerance:
        yield Finding(
            "batch contamination",
            f"A face's embedding depends on its neighbours in the batch: alone and between black, white and noise "
            f"it differs by 1 − cosine = {drift.max():.1e} (allowed {tolerance:g}). "
            "The model's export mixes rows; import it again: arcface import SOURCE",
        )


def _misplaced(reference: Array, unit: Array, usable: Array, drift: Array) -> tuple[list[Finding], Array]:
    """Findings on rows that hold another face's embedding or are isolated outliers, and all rows these cover."""
    similar = unit @ reference.T
    nearest = similar.argmax(axis=1)
    own = 1 - drift
    top = similar.max(axis=1)
    away = (nearest != usable) & (top > own + 0.01)
    if away.mean() > 0.5 and np.median(top) > _SAME_FACE:
        offsets, counts = np.unique((nearest - usable) % len(reference), return_counts=True)
        sentence = f"The rows are out of order: {away.sum()} of {len(usable)} hold another face's embedding."
        if counts.max() > 0.9 * len(usable):
            shift = int(offsets[counts.argmax()])
            shift = shift - len(reference) if shift > len(reference) / 2 else shift
            sentence = f"The rows are out of order: row i holds the embedding of face i{shift:+d}."
        return [Finding("rows out of order", sentence)], usable
    elsewhere = (nearest != usable) & (top > _THE_OTHER_FACE) & (top - own > 0.2)
    if elsewhere.mean() > 0.5:
        return [], np.array([], int)  # the faces have become alike, so order cannot be judged
    # Only rows that drift far more than the rest, so that a fault common to all is not blamed on a few.
    alone = elsewhere | (drift > max(20 * float(np.median(drift)), 0.05))
    if alone.mean() > 0.1:
        alone = elsewhere
    findings = []
    for at in np.flatnonzero(alone):
        row, other = int(usable[at]), int(nearest[at])
        if elsewhere[at]:
            sentence = (
                f"Row {row} holds the embedding of face {other} (cosine {similar[at, other]:.4f} to that face, "
                f"{own[at]:.4f} to its own face)."
            )
            findings.append(Finding("faces swapped", sentence, (row, other)))
        else:
            sentence = f"Face {row} is an outlier (cosine {own[at]:.4f}): it was embedded from another picture."
            findings.append(Finding("one face differs", sentence, (row,)))
    return findings, usable[alone]


def _preprocessing_fault(faces: Array, candidate: Array, network: Network, stated: Preprocessing) -> Finding | None:
    """The hypothesis that explains most, or None where none does."""

    def left(hypothesis: Hypothesis, count: int | None = None) -> Array:
        return 1 - cosine_per_face(network(hypothesis.prepare(faces[:count])), candidate[:count])

    untouched = left(Hypothesis("", "", stated.apply))
    before = float(untouched.mean())
    best, after = min(((h, float(left(h).mean())) for h in exact_faults(stated)), key=lambda pair: pair[1])
    if after < _EXPLAINED * before:
        return _explained(best, before, after)
    if before < _CROP_DRIFT:
        return None
    crops = [(hypothesis, left(hypothesis, _FACES_FOR_CROPS)) for hypothesis in crop_faults(stated)]
    best, _ = min(crops, key=lambda pair: pair[1].mean())
    best, after = _refined(best, float(left(best).mean()), stated, lambda h: float(left(h).mean()))
    if after < _EXPLAINED_BY_CROP * before:
        return _explained(best, before, after)
    each = float(np.min([per_face for _, per_face in crops], axis=0).mean())
    if each < _EXPLAINED_EACH * before:
        return Finding(
            "crop template off",
            f"The crops are cut differently from face to face: a separate shift or zoom brings each one closer "
            f"(1 − cosine {before:.1e} → {each:.1e}). Align five landmarks to the ArcFace template.",
        )
    half = len(faces) // 2
    if half:
        stretched = min(stretched_faults(stated), key=lambda h: float(left(h, half).mean()))
        now = float(left(stretched)[half:].mean())
        if now < _EXPLAINED_BY_STRETCH * float(untouched[half:].mean()):
            return _explained(stretched, float(untouched[half:].mean()), now)
    return None


def _explained(hypothesis: Hypothesis, before: float, after: float) -> Finding:
    return Finding(
        hypothesis.fault,
        f"{hypothesis.words} With this fault the reference gives "
        f"{'the same' if after < _SAME else 'nearer'} embeddings (1 − cosine {after:.1e}, without it {before:.1e}).",
    )


def _refined(
    best: Hypothesis, after: float, stated: Preprocessing, left: Callable[[Hypothesis], float]
) -> tuple[Hypothesis, float]:
    """Half-step descent from the best grid point, so that the sentence gives the right figures."""
    step = np.array([0.05, 2.0, 2.0])
    at = np.array(best.at)
    for _ in range(3):
        for axis in range(3):
            for sign in (-1, 1):
                trial = at.copy()
                trial[axis] += sign * step[axis]
                hypothesis = moved(stated, *trial)
                drift_left = left(hypothesis)
                if drift_left < after:
                    best, after, at = hypothesis, drift_left, trial
        step = step / 2
    return best, after


def _unit(embeddings: Sequence[Sequence[float]] | Array) -> Array:
    array = np.asarray(embeddings, np.float64)
    return np.asarray(array / np.linalg.norm(array, axis=1, keepdims=True))
