"""Groups faces by the person they show, using only the cosines between them.

All functions take the cosines float64 (N,N) of N different faces, with ones on the diagonal.
"""

from __future__ import annotations

import numpy as np

from arcface_clients.arrays import Array

# Two groups within one limit are two people who look alike if the mean distance between the groups exceeds this share
# of the limit, and both groups are tighter by this much in cosine. From 50 LFW people with MobileFaceNet: for pairs of
# people whose faces all lie within the limit, the gap is 0.21 or more; for eight faces of one person, split in the
# worst way, it is below 0.18 in 98 of 100 cases.
ALIKE_SHARE = 0.9
ALIKE_GAP = 0.18


def distances_to_others(cosines: Array, member: Array) -> Array:
    """Distance float32 (N,) of each face to the mean of the members, bool (N,), excluding itself.

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


def join_nearest(cosines: Array, max_distance: float) -> list[list[int]]:
    """Groups of faces, largest first; joins the two with the nearest means until none are within the limit."""
    groups = [sorted(group) for group in _merge(cosines, max_distance)[1]]
    return sorted(groups, key=lambda group: (-len(group), group))


def settle(cosines: Array, start: Array, max_distance: float) -> Array | None:
    """A stable set of members bool (N,), reached from `start`: exactly the faces within the limit of the others' mean.

    Moves one face at a time, the one furthest on the wrong side. None if this cycles, or no members are left.
    """
    member, seen = start, set()
    while member.any() and member.tobytes() not in seen:
        seen.add(member.tobytes())
        beyond = distances_to_others(cosines, member) - max_distance
        wrong = member == (beyond > 0)
        if not wrong.any():
            return member
        worst = int(np.where(wrong, np.abs(beyond), -1).argmax())
        member = member.copy()
        member[worst] = ~member[worst]
    return None


def divide(cosines: Array, max_distance: float) -> Array | None:
    """The larger part, bool (N,), if the faces look like two people in spite of the limit; else None.

    Tries the groups formed while joining the nearest, then moves single faces. A part has at least two faces, since
    the tightness of a single face is undefined.
    """
    count, to_all = len(cosines), cosines.sum(axis=1)
    total = float(to_all.sum())
    made, _ = _merge(cosines, 2.0)
    if not made:
        return None
    size = np.array([len(group) for group, _ in made])
    within = np.array([inside for _, inside in made])
    cross = np.array([to_all[group].sum() for group, _ in made]) - within
    gaps = _gap(size, within, cross, count, total, max_distance)
    gap = gaps.max()
    best = np.zeros(count, bool)
    best[made[int(gaps.argmax())][0]] = True
    while gap > -np.inf:
        to_part, sign = cosines[:, best].sum(axis=1), np.where(best, -1, 1)
        size, within = best.sum(), to_part[best].sum()
        cross = to_all[best].sum() - within
        # Moving face i adds or removes its cosines to the part (without itself) in `within`; likewise for `cross`.
        own = to_part - best
        rest = to_all - to_part - ~best
        gaps = _gap(
            size + sign, within + sign * 2 * own + sign, cross + sign * (rest - own), count, total, max_distance
        )
        move = int(gaps.argmax())
        if gaps[move] <= gap + 1e-9:
            break
        best, gap = best.copy(), gaps[move]
        best[move] = ~best[move]
    if gap <= ALIKE_GAP:
        return None
    return best if 2 * best.sum() >= count else ~best


def _gap(size: Array, within: Array, cross: Array, count: int, total: float, max_distance: float) -> Array:
    """How much tighter both parts are than faces across them, in mean cosine; −inf if they cannot be two people.

    Takes one part's `size`, its sum of cosines `within`, the sum `cross` to the other part, and the `total` of all.
    """
    other = count - size
    possible = (size >= 2) & (other >= 2)
    a, b = np.where(possible, size, 2), np.where(possible, other, 2)
    between = cross / (a * b)
    tight = np.minimum((within - a) / (a * (a - 1)), (total - within - 2 * cross - b) / (b * (b - 1)))
    return np.where(possible & (1 - between > ALIKE_SHARE * max_distance), tight - between, -np.inf)


def _merge(cosines: Array, max_distance: float) -> tuple[list[tuple[list[int], float]], list[list[int]]]:
    """Every group formed on the way, with its sum of cosines, and the final groups.

    Joins the two groups with the nearest means, up to the limit.
    """
    count = len(cosines)
    if not count:
        return [], []
    sums, length = cosines.copy(), np.ones(count)
    near = cosines.copy()  # cosines between means; −inf for groups that no longer exist
    np.fill_diagonal(near, -np.inf)
    nearest = near.argmax(axis=1)
    how_near = near.max(axis=1)
    groups = [[i] for i in range(count)]
    made: list[tuple[list[int], float]] = []
    for _ in range(count - 1):
        a = int(how_near.argmax())
        b = int(nearest[a])
        if 1 - how_near[a] > max_distance:
            break
        groups[a], groups[b] = groups[a] + groups[b], []
        sums[a] += sums[b]
        sums[:, a] += sums[:, b]
        made.append((groups[a], float(sums[a, a])))
        length[a] = np.sqrt(max(sums[a, a], 1e-12))
        gone = np.isneginf(near[a])  # including a itself
        near[b] = near[:, b] = -np.inf
        near[a] = np.where(gone, -np.inf, sums[a] / (length[a] * length))
        near[a, b] = -np.inf
        near[:, a] = near[a]
        nearer = near[a] >= how_near
        stale = ((nearest == a) | (nearest == b)) & ~nearer
        stale[[a, b]] = True
        nearest[nearer], how_near[nearer] = a, near[a, nearer]
        nearest[stale] = near[stale].argmax(axis=1)
        how_near[stale] = near[stale].max(axis=1)
    return made, [group for group in groups if group]
