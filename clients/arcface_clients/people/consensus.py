"""Embeddings of photos said to show one person in; who most of them show, and which do not belong, out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from arcface_clients.arrays import Array, unit_rows
from arcface_clients.errors import ConfigError, InvalidEmbeddings
from arcface_clients.people.vectors import cosine_distances, unit_pair

# Distances of a face to the mean of a person's other faces, read off 50 LFW people with MobileFaceNet: where own and
# foreign faces overlap. `scripts/consensus-demo` prints how many lie on the wrong side of each; `calibrate` finds
# max_distance for your model and photos.
MAX_DISTANCE = 0.62
ACCEPT_DISTANCE = 0.55
REJECT_DISTANCE = 0.70


@dataclass(frozen=True)
class Outlier:
    """A face that does not show the person: its place in the input and its distance to the members' mean."""

    index: int
    distance: float


@dataclass(frozen=True)
class Consensus:
    """What `find_consensus` found; indices are places in its input."""

    agreed: bool
    reason: str
    members: tuple[int, ...]
    outliers: tuple[Outlier, ...]
    embedding: Array | None = field(repr=False)  # float32 (D,), unit length; None where nothing was agreed
    distances: Array = field(repr=False)  # float32 (N,): to the mean of the members, a member's own share left out

    def to_json(self) -> dict[str, Any]:
        """Everything but the embedding, with plain numbers; distances are rounded to six digits."""
        return {
            "agreed": self.agreed,
            "reason": self.reason,
            "members": list(self.members),
            "outliers": [{"index": o.index, "distance": round(o.distance, 6)} for o in self.outliers],
            "distances": [round(float(d), 6) for d in self.distances],
        }


@dataclass(frozen=True)
class Verdict:
    """What `validate_candidate` decided, with the scores it stands on (all distances, 0..2)."""

    decision: Literal["accept", "reject", "unsure"]
    distance: float  # to the mean of the references; the decision is made on this one
    nearest: float
    median: float
    per_reference: Array = field(repr=False)  # float32 (R,)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, rounded to six digits."""
        scores = {name: round(getattr(self, name), 6) for name in ("distance", "nearest", "median")}
        return {"decision": self.decision, **scores, "per_reference": [round(float(d), 6) for d in self.per_reference]}


def find_consensus(
    embeddings: Array, max_distance: float = MAX_DISTANCE, min_support: int = 3, min_share: float = 0.5
) -> Consensus:
    """The majority of (N,D) embeddings that agree with each other; the same answer for any order of the input.

    The face whose neighbours are nearest starts, with as many of them as must agree. Then, until nothing changes,
    everybody within `max_distance` of the mean of the *other* members is a member. Bit-equal embeddings (one file
    twice) have one vote.

    Args:
        embeddings: any length of rows; they are normalised.
        max_distance: from a face to the mean of the other members, above 0 and up to 1.
        min_support: so many different faces must agree.
        min_share: and they must be more than this share of all different faces.

    Raises:
        InvalidEmbeddings: not (N,D), or a row is all zero or holds NaN.
        ConfigError: a limit that cannot be meant.
    """
    if not (0 < max_distance <= 1 and min_support >= 1 and 0 <= min_share < 1):
        raise ConfigError(
            f"expected max_distance in (0, 1], min_support of at least 1 and min_share in [0, 1), "
            f"got {max_distance}, {min_support} and {min_share}."
        )
    unit = unit_rows(embeddings)
    if not len(unit):
        return Consensus(False, "there is no face", (), (), None, np.empty(0, np.float32))
    # Sorted by content: neither the matrix product's rounding nor a tie can depend on the order of the input.
    _, first, place = np.unique(unit.view(f"V{unit.itemsize * unit.shape[1]}"), return_index=True, return_inverse=True)
    different, place = unit[first], place.reshape(-1)
    total = len(different)
    needed = max(min_support, int(min_share * total) + 1)
    member, distances = _grow(1 - cosine_distances(different).astype(np.float64), max_distance, min(needed, total))
    inside = member[place]
    agreeing = int(member.sum())
    agreed = agreeing >= needed
    reason = f"{agreeing} of {total} different faces agree" + ("" if agreed else f"; at least {needed} must")
    mean = different[member].sum(axis=0, dtype=np.float64)
    return Consensus(
        agreed=agreed,
        reason=reason,
        members=tuple(np.flatnonzero(inside).tolist()),
        outliers=tuple(Outlier(i, float(distances[place[i]])) for i in np.flatnonzero(~inside).tolist()),
        embedding=(mean / np.linalg.norm(mean)).astype(np.float32) if agreed else None,
        distances=distances[place],
    )


def validate_candidate(
    candidate: Array,
    references: Array,
    accept_distance: float = ACCEPT_DISTANCE,
    reject_distance: float = REJECT_DISTANCE,
) -> Verdict:
    """Whether an embedding (D,) shows the person of the reference embeddings (R,D), R ≥ 1.

    accept: within `accept_distance` of the references' mean; reject: beyond `reject_distance`; unsure between.

    Raises:
        InvalidEmbeddings: no reference, widths differ, zero or NaN.
        ConfigError: accept_distance above reject_distance.
    """
    if not 0 <= accept_distance <= reject_distance <= 2:
        raise ConfigError(
            f"expected 0 ≤ accept_distance ≤ reject_distance ≤ 2, got {accept_distance} and {reject_distance}."
        )
    one, many = unit_pair(np.asarray(candidate)[None], references)
    if not len(many):
        raise InvalidEmbeddings("there is no reference to validate against: expected at least one.")
    each = cosine_distances(many, one)[:, 0]
    distance = float(cosine_distances(one, many.mean(axis=0)[None])[0, 0])
    decision: Literal["accept", "reject", "unsure"] = (
        "accept" if distance <= accept_distance else "reject" if distance > reject_distance else "unsure"
    )
    return Verdict(decision, distance, float(each.min()), float(np.median(each)), each)


def calibrate(embeddings: Array, identities: Array, false_alarms: float = 0.005) -> float:
    """The `max_distance` beyond which `false_alarms` of the labelled people's own faces lie.

    Args:
        embeddings: (N,D) of people with at least two faces each, none of them wrong; others are left out.
        identities: (N,) names.
        false_alarms: share of own faces that may be called strangers, 0..1.

    Raises:
        InvalidEmbeddings: nobody has two faces, zero or NaN rows, more or fewer names than rows.
    """
    unit, names = unit_rows(embeddings), np.asarray(identities)
    if names.shape != unit.shape[:1]:
        raise InvalidEmbeddings(f"expected a name for each of {len(unit)} embeddings, got {names.size}.")
    own: list[Array] = []
    for name in np.unique(names):
        rows = unit[names == name]
        if len(rows) >= 2:
            everybody = np.ones(len(rows), bool)
            own.append(_to_others(1 - cosine_distances(rows).astype(np.float64), everybody))
    if not own:
        raise InvalidEmbeddings("nobody has two faces: calibration needs labelled people with several faces each.")
    return float(np.quantile(np.concatenate(own), 1 - false_alarms))


def _grow(cosines: Array, max_distance: float, start: int) -> tuple[Array, Array]:
    """Members bool (N,) and distances float32 (N,) from the cosines float64 (N,N) of different faces."""
    neighbours = np.argsort(-cosines, axis=1, kind="stable")[:, :start]
    seed = int(np.take_along_axis(cosines, neighbours, axis=1).sum(axis=1).argmax())
    member = np.zeros(len(cosines), bool)
    member[neighbours[seed]] = True
    seen: set[bytes] = set()
    while member.tobytes() not in seen:  # a state met twice would come round for ever
        seen.add(member.tobytes())
        member = _to_others(cosines, member) <= max_distance
        if not member.any():
            member[seed] = True
    return member, _to_others(cosines, member)


def _to_others(cosines: Array, member: Array) -> Array:
    """Distance float32 (N,) of each face to the mean of the members other than itself, from cosines alone.

    With S the sum of the members: x·(S − x) = x·S − 1 and |S − x|² = |S|² − 2 x·S + 1. A lone member is at 0.
    """
    to_sum = cosines[:, member].sum(axis=1)
    squared = to_sum[member].sum()
    dot = np.where(member, to_sum - 1, to_sum)
    length = np.sqrt(np.maximum(np.where(member, squared - 2 * to_sum + 1, squared), 0))
    alone = length < 1e-6
    cosine = np.where(alone, 0, dot / np.where(alone, 1, length))
    if member.sum() == 1:
        cosine = np.where(member, 1, cosine)
    return np.clip(1 - cosine, 0, 2).astype(np.float32)
