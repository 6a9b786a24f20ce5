"""Recognition accuracy on labelled pairs: ROC, EER, TAR at FAR, ten-fold accuracy and rank-1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.errors import InvalidFaces
from arcface_clients.evidence.drift import cosine_per_face
from arcface_clients.extras import require

FARS = (1e-1, 1e-2, 1e-3)
FOLDS = 10
RESAMPLES = 500
_ROC_POINTS = 200  # kept for plots


@dataclass(frozen=True)
class Pairs:
    """Rows `a` and `b` of an embedding array, and whether they show the same person; identities if known, else None."""

    a: Array  # int (P,)
    b: Array  # int (P,)
    same: Array  # bool (P,)
    identities: Array | None = None  # str (N,), of the faces

    def __post_init__(self) -> None:
        """Reject pairs from which no curve can be computed."""
        if not self.same.any() or self.same.all():
            raise InvalidFaces(
                f"accuracy needs pairs of one person and pairs of two: got {int(self.same.sum())} and "
                f"{int((~self.same).sum())}."
            )


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.value:.2f} % ({100 * self.low:.2f}–{100 * self.high:.2f})"


@dataclass(frozen=True)
class AccuracyReport:
    """Verification and identification metrics of one set of embeddings; rates are 0..1, scores are cosines."""

    genuine: int
    impostor: int
    genuine_mean: float
    impostor_mean: float
    auc: float
    eer: Interval
    eer_threshold: float
    tar_at_far: dict[str, Interval]
    fold_accuracy: float
    fold_standard_error: float
    fold_threshold: float
    rank1: float | None  # None if the identities are unknown
    roc: dict[str, list[float]]  # far, tar, threshold: a thinned curve for plots

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


@dataclass(frozen=True)
class ChangedDecisions:
    """Pairs that two backends decide differently at one threshold (same person: cosine ≥ threshold)."""

    threshold: float
    pairs: int
    changed: int
    changed_pairs: list[int]  # indices into the pairs, the clearest change first
    accuracy_reference: float
    accuracy_candidate: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def measure_accuracy(embeddings: Array, pairs: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> AccuracyReport:
    """All metrics of float (N,D) embeddings on labelled pairs.

    If identities are known, confidence intervals come from resampling *people*, since pairs that share a person are not
    independent (Bolle, Ratha and Pankanti 2004, "Error analysis of pattern recognition systems: the subsets
    bootstrap"); otherwise from resampling pairs.
    """
    require("sklearn", purpose="accuracy")
    from sklearn.metrics import roc_auc_score, roc_curve

    scores = pair_scores(embeddings, pairs)
    same = pairs.same
    far, tar, threshold = roc_curve(same, scores, drop_intermediate=False)
    eer, eer_threshold = equal_error_rate(far, tar, threshold)
    drawn = _resampled(scores, pairs, resamples, seed)
    fold_accuracy, fold_error, fold_threshold = fold_accuracies(scores, same)
    thin = np.unique(np.linspace(0, len(far) - 1, min(_ROC_POINTS, len(far))).astype(int))
    return AccuracyReport(
        genuine=int(same.sum()),
        impostor=int((~same).sum()),
        genuine_mean=float(scores[same].mean()),
        impostor_mean=float(scores[~same].mean()),
        auc=float(roc_auc_score(same, scores)),
        eer=_interval(eer, [equal_error_rate(*curve)[0] for curve in drawn]),
        eer_threshold=eer_threshold,
        tar_at_far={
            f"{limit:g}": _interval(tar_at(far, tar, limit), [tar_at(f, t, limit) for f, t, _ in drawn])
            for limit in FARS
            if limit * (~same).sum() >= 1  # less than one impostor pair cannot be measured
        },
        fold_accuracy=fold_accuracy,
        fold_standard_error=fold_error,
        fold_threshold=fold_threshold,
        rank1=rank1(embeddings, pairs.identities) if pairs.identities is not None else None,
        roc={
            "far": far[thin].tolist(),
            "tar": tar[thin].tolist(),
            "threshold": np.minimum(threshold[thin], 2).tolist(),
        },
    )


def pair_scores(embeddings: Array, pairs: Pairs) -> Array:
    """Cosine of each pair, float64 (P,)."""
    return cosine_per_face(embeddings[pairs.a], embeddings[pairs.b])


def equal_error_rate(far: Array, tar: Array, threshold: Array) -> tuple[float, float]:
    """The rate at which false accepts equal false rejects (linearly interpolated), and its threshold."""
    gap = far - (1 - tar)  # from −1 to 1 along the curve
    at = int(np.searchsorted(gap, 0.0))
    if at == 0 or gap[at] == gap[at - 1]:
        return float(far[at]), float(threshold[at])
    part = gap[at - 1] / (gap[at - 1] - gap[at])
    first = threshold[at - 1] if np.isfinite(threshold[at - 1]) else threshold[at]
    return (
        float(far[at - 1] + part * (far[at] - far[at - 1])),
        float(first + part * (threshold[at] - first)),
    )


def tar_at(far: Array, tar: Array, limit: float) -> float:
    """Largest true-accept rate at any threshold whose false-accept rate is at most `limit`."""
    return float(tar[np.searchsorted(far, limit, side="right") - 1])


def fold_accuracies(scores: Array, same: Array, folds: int = FOLDS) -> tuple[float, float, float]:
    """Accuracy by LFW's protocol: (mean over folds, its standard error, mean threshold).

    The best threshold on nine folds is applied to the tenth (Huang et al. 2007, "Labeled Faces in the
    Wild", view 2). Folds are stratified and seeded; LFW's own fold lists are not needed.
    """
    require("sklearn", purpose="accuracy")
    from sklearn.model_selection import StratifiedKFold

    accuracies, thresholds = [], []
    splits = min(folds, int(same.sum()), int((~same).sum()))
    if splits < 2:
        raise InvalidFaces(f"expected at least 2 genuine and 2 impostor pairs, got {same.sum()} and {(~same).sum()}.")
    for train, test in StratifiedKFold(splits, shuffle=True, random_state=0).split(scores[:, None], same):
        best = best_threshold(scores[train], same[train])
        thresholds.append(best)
        accuracies.append(np.mean((scores[test] >= best) == same[test]))
    return float(np.mean(accuracies)), float(np.std(accuracies, ddof=1) / np.sqrt(splits)), float(np.mean(thresholds))


def best_threshold(scores: Array, same: Array) -> float:
    """The threshold of highest accuracy, halfway between the two scores it separates."""
    order = np.argsort(scores)
    ranked, truth = scores[order], same[order]
    # Correct decisions if the first k pairs are classified as impostors.
    right = np.concatenate([[0], np.cumsum(~truth)]) + truth.sum() - np.concatenate([[0], np.cumsum(truth)])
    cut = int(right.argmax())
    if cut in (0, len(ranked)):
        return float(ranked[0] if cut == 0 else ranked[-1] + 1e-6)
    return float((ranked[cut - 1] + ranked[cut]) / 2)


def rank1(embeddings: Array, identities: Array) -> float:
    """Share of faces whose nearest other face shows the same person; people with a single face are not queried."""
    unit = np.asarray(embeddings, np.float32)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    nearest = np.empty(len(unit), np.int64)
    for start in range(0, len(unit), 1024):  # bounded memory: 1024 rows of similarities at a time
        block = unit[start : start + 1024] @ unit.T
        block[np.arange(len(block)), np.arange(start, start + len(block))] = -np.inf
        nearest[start : start + len(block)] = block.argmax(axis=1)
    names, counts = np.unique(identities, return_counts=True)
    asked = np.isin(identities, names[counts > 1])
    if not asked.any():
        raise InvalidFaces("rank-1 needs at least one person with two faces.")
    return float(np.mean(identities[nearest][asked] == identities[asked]))


def changed_decisions(reference: Array, candidate: Array, pairs: Pairs, threshold: float) -> ChangedDecisions:
    """The pairs that two sets of embeddings, float (N,D), decide differently at the user's threshold."""
    before, after = pair_scores(reference, pairs), pair_scores(candidate, pairs)
    flipped = np.flatnonzero((before >= threshold) != (after >= threshold))
    clearest = flipped[np.argsort(-np.abs(after - before)[flipped], kind="stable")]
    return ChangedDecisions(
        threshold=float(threshold),
        pairs=len(before),
        changed=len(flipped),
        changed_pairs=clearest.tolist(),
        accuracy_reference=float(np.mean((before >= threshold) == pairs.same)),
        accuracy_candidate=float(np.mean((after >= threshold) == pairs.same)),
    )


def pairs_from_csv(path: Path, names: Sequence[str]) -> Pairs:
    """Pairs from lines `a,b,same` (same: 1 or 0); `names` are the faces' paths, matched by suffix.

    A face's identity is the name of its folder.

    Raises:
        InvalidFaces: a line is malformed, or names a face that does not exist.
    """
    index = {name: row for row, name in enumerate(names)}
    for row, name in enumerate(names):  # so that pairs.csv may name crops below any folder
        parts = Path(name).parts
        for depth in range(1, len(parts)):
            index.setdefault("/".join(parts[depth:]), row)
    try:
        lines = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as exc:
        raise InvalidFaces(f"{path} is not text: expected lines a,b,same.") from exc
    lines = lines[1:] if lines and lines[0][-1].strip() not in ("0", "1") else lines
    wrong = next((line for line in lines if len(line) != 3 or line[2].strip() not in ("0", "1")), None)
    if wrong:
        raise InvalidFaces(f"{path} contains the line {','.join(wrong)!r}: expected a,b,same with same 1 or 0.")
    if not lines:
        raise InvalidFaces(f"{path} contains no pairs: expected lines a,b,same with same 1 or 0.")
    wanted = {name for a, b, _ in lines for name in (a, b)}
    absent = sorted(wanted - index.keys())
    if absent:
        raise InvalidFaces(f"{path} names {len(absent)} faces that do not exist, such as {absent[0]}.")
    return Pairs(
        np.array([index[a] for a, _, _ in lines]),
        np.array([index[b] for _, b, _ in lines]),
        np.array([same.strip() == "1" for _, _, same in lines]),
        np.array(identities_from_paths(names)),
    )


def pairs_from_identities(identities: Sequence[str], most: int = 20_000, seed: int = 0) -> Pairs:
    """All genuine pairs and as many impostor pairs, seeded; at most `most` of each."""
    people = np.asarray(identities)
    rng = np.random.default_rng(seed)
    a, b = np.triu_indices(len(people), 1)
    same = people[a] == people[b]
    count = min(int(same.sum()), most)
    genuine = np.sort(rng.permutation(np.flatnonzero(same))[:count])
    impostor = np.sort(rng.permutation(np.flatnonzero(~same))[:count])
    kept = np.concatenate([genuine, impostor])
    return Pairs(a[kept], b[kept], same[kept], people)


def identities_from_paths(names: Sequence[str]) -> list[str]:
    """A face's identity is the name of its folder."""
    return [Path(name).parent.name for name in names]


def _resampled(scores: Array, pairs: Pairs, resamples: int, seed: int) -> list[tuple[Array, Array, Array]]:
    """(far, tar, threshold) curves of bootstrap samples."""
    rng = np.random.default_rng(seed)
    order = np.argsort(-scores, kind="stable")
    ranked, same = scores[order], pairs.same[order]
    curves = []
    for _ in range(resamples):
        weight = _weights(rng, pairs)[order]
        genuine, impostor = np.cumsum(weight * same), np.cumsum(weight * ~same)
        if genuine[-1] > 0 and impostor[-1] > 0:
            curves.append(
                (
                    np.concatenate([[0.0], impostor / impostor[-1]]),
                    np.concatenate([[0.0], genuine / genuine[-1]]),
                    np.concatenate([[np.inf], ranked]),
                )
            )
    return curves


def _weights(rng: np.random.Generator, pairs: Pairs) -> Array:
    """How often each pair occurs in one bootstrap sample."""
    if pairs.identities is None:
        return rng.multinomial(len(pairs.same), np.full(len(pairs.same), 1 / len(pairs.same))).astype(float)
    people, row = np.unique(pairs.identities, return_inverse=True)
    drawn = rng.multinomial(len(people), np.full(len(people), 1 / len(people))).astype(float)
    first, second = row[pairs.a], row[pairs.b]
    return np.where(first == second, drawn[first], drawn[first] * drawn[second])


def _interval(value: float, drawn: Sequence[float]) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (value, value)
    return Interval(float(value), float(low), float(high))
