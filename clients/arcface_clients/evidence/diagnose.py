"""Explains in words why a candidate's embeddings differ from the reference's.

Each hypothesis is tried on the reference: its input is deliberately prepared wrongly, and if that reproduces the
candidate (drift falls to a fraction), the candidate has that fault. This needs only the candidate's embeddings; if the
candidate can also be called, the test covers whether a face's embedding depends on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import FACE_SIZE, Preprocessing
from arcface_clients.errors import InvalidFaces
from arcface_clients.evidence.drift import cosine_per_face
from arcface_clients.faces.check import check_faces

NOISE = 1e-6  # float32 networks on two runtimes differ by less
_EXPLAINED = 0.1  # a preprocessing fault must leave less than this share of the drift
_EXPLAINED_BY_CROP = 0.35  # a shifted crop lacks the pixels beyond its border, so it cannot be reproduced exactly
_EXPLAINED_EACH = 0.5  # picking the best of many shifts for each face flatters the hypothesis
_CROP_DRIFT = 1e-3  # a crop shifted by one pixel drifts further than this
_FACES = 6  # enough to tell hypotheses apart
_FACES_FOR_CROPS = 4  # of these; there are many crops to try
_SAME_FACE = 0.95
_THE_OTHER_FACE = 0.6  # this close to another face, and this much closer than to its own: it is the other face's

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


@dataclass(frozen=True)
class _Hypothesis:
    fault: str
    words: str
    prepare: Callable[[Array], Array]
    at: tuple[float, float, float] = (1.0, 0.0, 0.0)  # zoom, px right, px down


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
    norms = np.linalg.norm(candidate, axis=1)
    usable = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    findings = [*_bad_rows(norms), *_not_normalised(norms[usable])]
    if not len(usable):
        return findings
    if encode is not None:
        findings += _batch_dependence(faces, encode, batch_tolerance)
    reference = _unit(network(preprocessing.apply(faces)))
    if reference.shape != candidate.shape:
        raise InvalidFaces(f"expected embeddings of width {reference.shape[1]}, got {candidate.shape[1]}.")
    drift = 1 - cosine_per_face(reference[usable], candidate[usable])
    moved, stray = _misplaced(reference, _unit(candidate[usable]), usable, drift)
    findings += moved
    rest = ~np.isin(usable, stray)
    mixed = any(finding.fault == "batch contamination" for finding in findings)
    if rest.any() and np.median(drift[rest]) > NOISE and not mixed:
        rows = usable[rest][:: max(1, int(rest.sum()) // _FACES)][:_FACES]
        findings.append(_preprocessing_fault(faces[rows], candidate[rows], network, preprocessing, drift[rest]))
    return findings


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


def _preprocessing_fault(
    faces: Array, candidate: Array, network: Network, stated: Preprocessing, drift: Array
) -> Finding:
    """The hypothesis that explains the most, or a finding that none does."""

    def left(hypothesis: _Hypothesis, count: int | None = None) -> Array:
        return 1 - cosine_per_face(network(hypothesis.prepare(faces[:count])), candidate[:count])

    before = float(left(_Hypothesis("", "", stated.apply)).mean())
    best, after = min(((h, float(left(h).mean())) for h in _pixel_faults(stated)), key=lambda pair: pair[1])
    if after < _EXPLAINED * before:
        return _explained(best, before, after)
    median, largest = float(np.median(drift)), float(drift.max())
    if before < _CROP_DRIFT:
        return Finding(
            "weights or precision",
            f"No preprocessing fault explains the drift (median {median:.1e}, largest {largest:.1e}, on all faces): "
            "the weights or the precision differ. Find the layer: arcface compare A.onnx B.onnx --layers",
        )
    crops = [(hypothesis, left(hypothesis, _FACES_FOR_CROPS)) for hypothesis in _crop_faults(stated)]
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
    return Finding(
        "another network or other pictures",
        f"No known fault explains a drift this large (median {median:.1e}, largest {largest:.1e}): "
        "it is another network, or these are crops of other pictures.",
    )


def _explained(hypothesis: _Hypothesis, before: float, after: float) -> Finding:
    return Finding(
        hypothesis.fault,
        f"{hypothesis.words} With this fault the reference gives the same embeddings "
        f"(1 − cosine {after:.1e}; without it {before:.1e}).",
    )


def _pixel_faults(stated: Preprocessing) -> Iterator[_Hypothesis]:
    """Wrong channel order, wrong mean or std, and both together."""
    other = "bgr" if stated.color == "rgb" else "rgb"
    swapped = f"The channels are swapped: the network expects {stated.color.upper()} and gets {other.upper()}."
    mean, std = np.array(stated.mean), np.array(stated.std)
    numbers: list[tuple[str, str, Array, Array]] = [
        (
            "wrong scale",
            f"Pixels are divided by {std[0] * 128 / 127.5:g} instead of {std[0]:g} (/128 for /127.5).",
            mean,
            std * 128 / 127.5,
        ),
        ("missing normalisation", "The normalisation is missing: the network gets 0..255.", 0 * mean, 0 * std + 1),
        ("missing normalisation", "Pixels are only divided by 255: the network gets 0..1.", 0 * mean, 0 * std + 255),
        ("missing normalisation", "The mean is not subtracted; pixels are only divided.", 0 * mean, std),
        ("normalised twice", "The normalisation is applied twice.", mean + std * mean, std * std),
        ("wrong numbers", "Mean and std are given in the other channel order.", mean[::-1], std[::-1]),
        ("wrong numbers", "Mean 127.5 and std 127.5 (InsightFace's) are used.", 0 * mean + 127.5, 0 * std + 127.5),
        ("wrong numbers", "Mean 127.5 and std 128 are used.", 0 * mean + 127.5, 0 * std + 128),
        (
            "wrong numbers",
            "ImageNet's mean and std are used.",
            255 * np.array([0.485, 0.456, 0.406]),
            255 * np.array([0.229, 0.224, 0.225]),
        ),
    ]
    yield _Hypothesis("channels swapped", swapped, replace(stated, color=other).apply)
    for fault, words, m, s in numbers:
        wrong = Preprocessing(stated.color, tuple(m), tuple(s))
        if np.allclose(m, mean) and np.allclose(s, std):
            continue
        if fault == "wrong numbers":
            words = f"{words} The network expects mean {_written(mean)}, std {_written(std)}."
        yield _Hypothesis(fault, words, wrong.apply)
        yield _Hypothesis(f"channels swapped, {fault}", f"{swapped} {words}", replace(wrong, color=other).apply)
    yield _Hypothesis(
        "layout",
        "The pixels are reshaped to NCHW instead of transposed.",
        lambda faces: stated.apply(faces).transpose(0, 2, 3, 1).reshape(len(faces), 3, FACE_SIZE, FACE_SIZE),
    )


def _crop_faults(stated: Preprocessing) -> Iterator[_Hypothesis]:
    """Crops that do not follow the template: mirrored, upside down, shifted or zoomed."""
    yield _Hypothesis("crop mirrored", "The crops are mirrored.", lambda faces: stated.apply(faces[:, :, ::-1]))
    yield _Hypothesis("crop turned", "The crops are upside down.", lambda faces: stated.apply(faces[:, ::-1, ::-1]))
    for scale, dx, dy in (
        *((1.0, dx, dy) for dx in (-8, -4, 0, 4, 8) for dy in (-8, -4, 0, 4, 8) if dx or dy),
        *((scale, 0, dy) for scale in (0.8, 0.9, 1.1, 1.25) for dy in (-6, 0, 6)),
    ):
        yield _moved(stated, scale, dx, dy)


def _moved(stated: Preprocessing, scale: float, dx: float, dy: float) -> _Hypothesis:
    parts = [f"shifted by {dx:+g} px to the right and {dy:+g} px down"] if dx or dy else []
    parts += [f"zoomed by {scale:.3g}"] if scale != 1 else []
    return _Hypothesis(
        "crop template off",
        f"The crops do not follow the ArcFace template: {' and '.join(parts)}.",
        lambda faces: stated.apply(warp(faces, scale, dx, dy)),
        (scale, dx, dy),
    )


def _refined(
    best: _Hypothesis, after: float, stated: Preprocessing, left: Callable[[_Hypothesis], float]
) -> tuple[_Hypothesis, float]:
    """Refine the best grid point with halving steps, so that the message states accurate figures."""
    if best.fault != "crop template off":  # mirrored or upside down: nothing to refine
        return best, after
    step = np.array([0.05, 2.0, 2.0])
    at = np.array(best.at)
    for _ in range(3):
        for axis in range(3):
            for sign in (-1, 1):
                trial = at.copy()
                trial[axis] += sign * step[axis]
                hypothesis = _moved(stated, *trial)
                drift_left = left(hypothesis)
                if drift_left < after:
                    best, after, at = hypothesis, drift_left, trial
        step = step / 2
    return best, after


def warp(faces: Array, scale: float, dx: float, dy: float) -> Array:
    """Faces uint8 (N,112,112,3) zoomed about their centre and shifted, in pixels; bilinear, borders repeated."""
    centre = (FACE_SIZE - 1) / 2

    def along(values: Array, axis: int, shift: float) -> Array:
        source = np.clip((np.arange(FACE_SIZE) - centre - shift) / scale + centre, 0, FACE_SIZE - 1)
        low = np.minimum(source.astype(int), FACE_SIZE - 2)
        part = (source - low).astype(np.float32)
        part = part.reshape(-1, *[1] * (values.ndim - axis - 1))
        between: Array = values.take(low, axis) * (1 - part) + values.take(low + 1, axis) * part
        return between

    moved = along(along(faces.astype(np.float32), 1, dy), 2, dx)
    return np.rint(moved).astype(np.uint8)


def _unit(embeddings: Sequence[Sequence[float]] | Array) -> Array:
    array = np.asarray(embeddings, np.float64)
    unit: Array = array / np.linalg.norm(array, axis=1, keepdims=True)
    return unit


def _written(values: Array) -> str:
    rounded = [f"{v:g}" for v in np.round(values, 3)]
    return rounded[0] if len(set(rounded)) == 1 else f"({', '.join(rounded)})"
