"""Finds the person that most of a set of faces show, and the faces that show somebody else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from arcface_clients.arrays import Array, unit_rows
from arcface_clients.errors import ConfigError, InvalidEmbeddings
from arcface_clients.people.grouping import distances_to_others, divide, join_nearest, settle
from arcface_clients.people.vectors import cosine_distances, unit_pair

# Distances from a face to the mean of a person's other faces, where the person's own and other people's faces overlap:
# 50 LFW people, MobileFaceNet. `scripts/consensus-demo` prints how many faces are on the wrong side of each limit;
# `calibrate` finds max_distance for your model and photos.
MAX_DISTANCE = 0.62
ACCEPT_DISTANCE = 0.55
REJECT_DISTANCE = 0.70
VOTE_SHARE = 0.95  # a majority must not depend on a face beyond this share of max_distance


@dataclass(frozen=True)
class Outlier:
    """A face that does not show the person: its index in the input and its distance to the members' mean."""

    index: int
    distance: float


@dataclass(frozen=True)
class Consensus:
    """What `find_consensus` found; indices refer to its input. If undecided: no members, outliers or embedding."""

    agreed: bool
    reason: str
    members: tuple[int, ...]
    outliers: tuple[Outlier, ...]
    groups: tuple[
        tuple[int, ...], ...
    ]  # two or more faces that agree with each other; the members' group first, else the largest
    embedding: Array | None = field(repr=False)  # float32 (D,), unit length
    distances: Array = field(repr=False)  # float32 (N,): to the mean of the first group without the face itself

    def to_json(self) -> dict[str, Any]:
        """Everything but the embedding, as plain numbers; distances are rounded to six digits."""
        return {
            "agreed": self.agreed,
            "reason": self.reason,
            "members": list(self.members),
            "outliers": [{"index": o.index, "distance": round(o.distance, 6)} for o in self.outliers],
            "groups": [list(group) for group in self.groups],
            "distances": [round(float(d), 6) for d in self.distances],
        }


@dataclass(frozen=True)
class CandidateDecision:
    """Result of `validate_candidate`, with the scores behind it (all distances, 0..2)."""

    decision: Literal["accept", "reject", "unsure"]
    distance: float  # to the mean of the references; the decision depends on this one alone
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
    """Find the clear majority of (N,D) embeddings that agree with each other, whatever the order of the input.

    Members are all faces within `max_distance` of the mean of the *other* members. The result is undecided, with the
    groups that were found, if no group is large enough, another is as large, the members look like two people, or so
    many of them are nearer to another group that too few remain. Bit-equal embeddings (one file twice) count once.

    Args:
        embeddings: rows of any length; they are normalised.
        max_distance: from a face to the mean of the other members, above 0 and up to 1.
        min_support: at least this many different faces must agree.
        min_share: they must also be more than this share of all different faces.

    Raises:
        InvalidEmbeddings: not (N,D), or a row is all zero or contains NaN.
        ConfigError: a limit out of range.
    """
    if not (0 < max_distance <= 1 and min_support >= 1 and 0 <= min_share < 1):
        raise ConfigError(
            f"expected max_distance in (0, 1], min_support of at least 1 and min_share in [0, 1), "
            f"got {max_distance}, {min_support} and {min_share}."
        )
    unit = unit_rows(embeddings)
    if not len(unit):
        return Consensus(False, "there is no face", (), (), (), None, np.empty(0, np.float32))
    # Sorted by content, so that neither the matrix product's rounding nor ties depend on the order of the input.
    _, first, place = np.unique(unit.view(f"V{unit.itemsize * unit.shape[1]}"), return_index=True, return_inverse=True)
    different, place = unit[first], place.reshape(-1)
    cosines = 1 - cosine_distances(different).astype(np.float64)
    needed = max(min_support, int(min_share * len(different)) + 1)
    groups, reason = _majority(cosines, max_distance, needed)
    agreed = not reason
    distances = distances_to_others(cosines, groups[0])[place]
    inside = groups[0][place] if agreed else np.zeros(len(unit), bool)
    mean = different[groups[0]].sum(axis=0, dtype=np.float64)
    return Consensus(
        agreed=agreed,
        reason=reason or f"{groups[0].sum()} of {len(different)} different faces agree",
        members=tuple(np.flatnonzero(inside).tolist()),
        outliers=tuple(Outlier(int(i), float(distances[i])) for i in np.flatnonzero(~inside)) if agreed else (),
        groups=tuple(tuple(np.flatnonzero(group[place]).tolist()) for group in groups if group.sum() > 1),
        embedding=(mean / np.linalg.norm(mean)).astype(np.float32) if agreed else None,
        distances=distances,
    )


def _majority(cosines: Array, max_distance: float, needed: int) -> tuple[list[Array], str]:
    """Groups bool (N,) of different faces, the candidate majority first; and why it is not one, else ""."""
    total = len(cosines)
    starts = [_mask(group, total) for group in join_nearest(cosines, max_distance)]
    settled = [member for start in starts if (member := settle(cosines, start, max_distance)) is not None]
    if not settled:
        return starts, "the faces form no stable group"
    member = max(settled, key=lambda mask: int(mask.sum()))
    while member.sum() >= needed and (part := divide(cosines[np.ix_(member, member)], max_distance)) is not None:
        inside = np.flatnonzero(member)
        larger, smaller = _mask(inside[part], total), _mask(inside[~part], total)
        if larger.sum() < max(needed, 2 * smaller.sum()):
            reason = (
                f"{member.sum()} of {total} different faces are alike, but form two groups, like two people: "
                f"{larger.sum()} and {smaller.sum()}"
            )
            return [larger, smaller, *_others(cosines, member, max_distance)], reason
        if 1 - cosines[np.ix_(larger, smaller)].mean() <= max_distance:
            break  # the smaller part may just as well be odd photos of the same person
        member = larger
    nearer = np.zeros(total, bool)
    for group in _others(cosines, member, max_distance):
        nearer |= distances_to_others(cosines, group) < distances_to_others(cosines, member)
    contested = int((member & nearer).sum())
    member = member & ~nearer if (member & ~nearer).any() else member
    barely = int((distances_to_others(cosines, member)[member] > VOTE_SHARE * max_distance).sum())
    others = _others(cosines, member, max_distance)
    reason = f"{member.sum()} of {total} different faces agree"
    if member.sum() - barely < needed:
        reason += f", {barely} of them barely" if barely else ""
        reason += f", {contested} more are nearer to others" if contested else ""
        return sorted([member, *others], key=lambda mask: -int(mask.sum())), f"{reason}; at least {needed} must"
    if any(group.sum() >= member.sum() for group in others):
        return [member, *others], f"{reason}, and as many others agree with each other"
    return [member, *others], ""


def _others(cosines: Array, member: Array, max_distance: float) -> list[Array]:
    """The groups formed by the faces outside `member`, largest first."""
    rest = np.flatnonzero(~member)
    return [_mask(rest[group], len(cosines)) for group in join_nearest(cosines[np.ix_(rest, rest)], max_distance)]


def _mask(rows: Array | list[int], total: int) -> Array:
    mask = np.zeros(total, bool)
    mask[rows] = True
    return mask


def validate_candidate(
    candidate: Array,
    references: Array,
    accept_distance: float = ACCEPT_DISTANCE,
    reject_distance: float = REJECT_DISTANCE,
) -> CandidateDecision:
    """Decide whether an embedding (D,) shows the person of the reference embeddings (R,D), R ≥ 1.

    accept: within `accept_distance` of the references' mean; reject: beyond `reject_distance`; unsure between.

    Raises:
        InvalidEmbeddings: no reference, different widths, zero or NaN rows.
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
    return CandidateDecision(decision, distance, float(each.min()), float(np.median(each)), each)


def calibrate(embeddings: Array, identities: Array, false_alarms: float = 0.005) -> float:
    """The `max_distance` that a share `false_alarms` of the labelled people's own faces exceeds.

    Args:
        embeddings: (N,D), correctly labelled; people with only one face are ignored.
        identities: (N,) names.
        false_alarms: share of a person's own faces that may be rejected, 0..1.

    Raises:
        InvalidEmbeddings: nobody has two faces, zero or NaN rows, or not one name per row.
    """
    unit, names = unit_rows(embeddings), np.asarray(identities)
    if names.shape != unit.shape[:1]:
        raise InvalidEmbeddings(f"expected one name for each of {len(unit)} embeddings, got {names.size}.")
    own: list[Array] = []
    for name in np.unique(names):
        rows = unit[names == name]
        if len(rows) >= 2:
            everybody = np.ones(len(rows), bool)
            own.append(distances_to_others(1 - cosine_distances(rows).astype(np.float64), everybody))
    if not own:
        raise InvalidEmbeddings("nobody has two faces: calibration needs labelled people with several faces each.")
    return float(np.quantile(np.concatenate(own), 1 - false_alarms))
