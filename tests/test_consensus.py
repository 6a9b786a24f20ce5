"""Who most photos show, who does not belong, and whether a candidate does."""

from __future__ import annotations

import numpy as np
import pytest

from arcface_clients.errors import ConfigError, InvalidEmbeddings
from arcface_clients.people.consensus import calibrate, find_consensus, validate_candidate
from arcface_tools.consensus import EQUAL_CROWDS, find_mixtures

DIM = 128


def views(seed: int, count: int, spread: float = 0.5) -> np.ndarray:
    """`count` embeddings around one random direction; spread is the noise's length beside the direction's 1."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=DIM) / np.sqrt(DIM)
    return (direction + spread * rng.normal(size=(count, DIM)) / np.sqrt(DIM)).astype(np.float32)


def lfw_like(rng: np.random.Generator, count: int, dim: int = 96) -> np.ndarray:
    """`count` unit embeddings of a new person, as near to each other as LFW people's are.

    Noise around a random direction; how much differs from person to person and from photo to photo.
    """
    direction, noise = rng.normal(size=dim), rng.normal(size=(count, dim))
    direction /= np.linalg.norm(direction)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    share = np.clip(rng.normal(0.65, 0.08) + rng.normal(0, 0.09, (count, 1)), 0.25, 0.9)
    rows = np.sqrt(share) * direction + np.sqrt(1 - share) * noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_strangers_are_outliers_and_named_with_their_distance() -> None:
    consensus = find_consensus(np.concatenate([views(1, 6), views(2, 1), views(3, 1)]))
    assert consensus.agreed
    assert consensus.members == (0, 1, 2, 3, 4, 5)
    assert [outlier.index for outlier in consensus.outliers] == [6, 7]
    assert all(0.7 < outlier.distance < 1.3 for outlier in consensus.outliers)
    assert consensus.reason == "6 of 8 different faces agree"
    assert np.linalg.norm(consensus.embedding) == pytest.approx(1, abs=1e-6)
    assert consensus.embedding.dtype == np.float32


def test_distances_leave_a_members_own_share_out() -> None:
    faces = views(1, 5)
    consensus = find_consensus(faces)
    unit = faces / np.linalg.norm(faces, axis=1, keepdims=True)
    for i in range(5):
        others = unit.sum(axis=0) - unit[i]
        assert consensus.distances[i] == pytest.approx(1 - unit[i] @ others / np.linalg.norm(others), abs=1e-6)


def test_the_order_of_the_input_changes_nothing() -> None:
    faces = np.concatenate([views(1, 5, 0.9), views(2, 3, 0.9), views(3, 2)])
    first = find_consensus(faces)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(faces))
        again = find_consensus(faces[order])
        assert np.array_equal(again.embedding, first.embedding) if first.agreed else again.embedding is None
        assert sorted(order[list(again.members)]) == list(first.members)
        assert np.array_equal(again.distances, first.distances[order])


def test_the_larger_of_two_people_wins_whoever_comes_first() -> None:
    consensus = find_consensus(np.concatenate([views(2, 3), views(1, 5)]))
    assert consensus.agreed
    assert consensus.members == (3, 4, 5, 6, 7)


def test_a_draw_between_two_people_is_no_consensus() -> None:
    consensus = find_consensus(np.concatenate([views(1, 4), views(2, 4)]))
    assert not consensus.agreed
    assert consensus.embedding is None
    assert consensus.reason == "4 of 8 different faces agree; at least 5 must"
    assert (consensus.members, consensus.outliers) == ((), ())
    assert sorted(consensus.groups) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert sorted(consensus.to_json()["groups"]) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_two_groups_of_one_size_are_undecided_however_small_the_share_asked_for() -> None:
    consensus = find_consensus(np.concatenate([views(1, 4), views(2, 4), views(3, 2)]), min_share=0.2)
    assert consensus.reason == "4 of 10 different faces agree, and as many others agree with each other"
    assert consensus.groups[2] == (8, 9)
    assert find_consensus(np.concatenate([views(1, 4), views(2, 3), views(3, 2)]), min_share=0.2).agreed


DRAWS = 2_000


@pytest.mark.parametrize("crowd", EQUAL_CROWDS, ids=str)
def test_people_with_as_many_photos_each_are_never_averaged(crowd: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(crowd) * 10 + crowd[0])
    agreed = [find_consensus(np.concatenate([lfw_like(rng, count) for count in crowd])).agreed for _ in range(DRAWS)]
    assert sum(agreed) == 0


@pytest.mark.parametrize("crowd", EQUAL_CROWDS, ids=str)
def test_lfw_people_with_as_many_photos_each_are_never_averaged(lfw_embeddings, crowd: tuple[int, ...]) -> None:
    embeddings, names = lfw_embeddings
    assert find_mixtures(embeddings, names, crowd, DRAWS, seed=1)["agreed"] == 0


def test_made_up_people_are_as_near_and_far_as_lfw_people() -> None:
    rng = np.random.default_rng(0)
    pairs = np.array([(a @ b, a @ c) for (a, b), c in ((lfw_like(rng, 2), lfw_like(rng, 1)[0]) for _ in range(4_000))])
    own, foreign = pairs.T
    assert own.mean() == pytest.approx(0.64, abs=0.03)  # LFW, MobileFaceNet: 0.641 ± 0.124
    assert own.std() == pytest.approx(0.12, abs=0.03)
    assert (foreign.mean(), foreign.std()) == pytest.approx((0.01, 0.10), abs=0.02)  # 0.012 ± 0.103


@pytest.mark.parametrize(("crowd", "at_least"), [((4, 2), 0.9), ((6, 3), 0.95), ((6, 4), 0.95), ((8, 1, 1, 1), 0.98)])
def test_a_clear_majority_of_lfw_like_people_is_agreed_on(crowd: tuple[int, ...], at_least: float) -> None:
    rng = np.random.default_rng(3)
    found = [find_consensus(np.concatenate([lfw_like(rng, count) for count in crowd])) for _ in range(300)]
    assert np.mean([consensus.agreed for consensus in found]) >= at_least
    assert not any(member >= crowd[0] for consensus in found if consensus.agreed for member in consensus.members[:1])


def lookalikes(cosine: float, counts: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Two people whose directions have this cosine; a person's photos have 0.65 with each other."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(DIM, 2 + sum(counts))))[0].T
    directions = [axes[0], cosine * axes[0] + np.sqrt(1 - cosine**2) * axes[1]]
    who = np.repeat(directions, counts, axis=0)
    return (np.sqrt(0.65) * who + np.sqrt(0.35) * axes[2:]).astype(np.float32)


def test_lookalikes_within_the_limit_are_two_groups_and_not_one_person() -> None:
    consensus = find_consensus(lookalikes(0.55, (4, 4)))
    assert (consensus.distances <= 0.62).all()
    assert consensus.reason.startswith("8 of 8 different faces are alike, but form two groups, like two people")
    assert sorted(consensus.groups) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert find_consensus(lookalikes(0.8, (4, 4))).agreed


def test_a_few_lookalike_photos_among_many_are_outliers() -> None:
    consensus = find_consensus(lookalikes(0.5, (7, 2)))
    assert consensus.members == (0, 1, 2, 3, 4, 5, 6)
    assert consensus.groups == ((0, 1, 2, 3, 4, 5, 6), (7, 8))


def test_one_file_eight_times_has_one_vote() -> None:
    copies = np.repeat(views(2, 1), 8, axis=0)
    consensus = find_consensus(np.concatenate([copies, views(1, 4)]))
    assert consensus.agreed
    assert consensus.members == (8, 9, 10, 11)
    assert len(consensus.outliers) == 8


@pytest.mark.parametrize(("count", "reason"), [(1, "1 of 1 different faces agree; at least 3 must"), (2, "2 of 2 ")])
def test_too_few_faces_are_no_consensus(count: int, reason: str) -> None:
    consensus = find_consensus(views(1, count, 0.2))
    assert not consensus.agreed
    assert consensus.reason.startswith(reason)
    assert find_consensus(views(1, count, 0.2), min_support=1).agreed


def test_no_face_and_a_lone_face_are_answered() -> None:
    assert find_consensus(np.empty((0, DIM))).reason == "there is no face"
    lone = find_consensus(views(1, 1), min_support=1)
    assert lone.distances.tolist() == [0]


def test_faces_opposite_to_each_other_do_not_break_the_mean() -> None:
    face = views(1, 1)
    consensus = find_consensus(np.concatenate([face, -face]), max_distance=1, min_support=2)
    assert not consensus.agreed
    assert sorted(consensus.distances.tolist()) == [0, 2]


def test_impossible_limits_and_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_distance in \(0, 1\]"):
        find_consensus(views(1, 3), max_distance=0)
    with pytest.raises(InvalidEmbeddings, match="first row 1 is all zero"):
        find_consensus(np.concatenate([views(1, 1), np.zeros((1, DIM), np.float32)]))


@pytest.mark.parametrize(("spread", "decision"), [(0.3, "accept"), (1.5, "unsure"), (12.0, "reject")])
def test_a_candidate_is_accepted_rejected_or_left_open(spread: float, decision: str) -> None:
    references = views(1, 6, 0.3)
    found = validate_candidate(views(1, 7, spread)[6], references, accept_distance=0.3, reject_distance=0.7)
    assert found.decision == decision
    assert found.nearest <= found.median
    assert found.per_reference.shape == (6,)
    assert set(found.to_json()) == {"decision", "distance", "nearest", "median", "per_reference"}


def test_validation_without_references_or_with_crossed_limits_is_refused() -> None:
    with pytest.raises(InvalidEmbeddings, match="no reference"):
        validate_candidate(views(1, 1)[0], np.empty((0, DIM)))
    with pytest.raises(ConfigError, match="accept_distance ≤ reject_distance"):
        validate_candidate(views(1, 1)[0], views(1, 3), accept_distance=0.8, reject_distance=0.5)


def test_calibration_finds_the_distance_that_own_faces_reach() -> None:
    faces = np.concatenate([views(seed, 10, 0.8) for seed in range(20)])
    names = np.repeat([f"person {i}" for i in range(20)], 10)
    limit = calibrate(faces, names, false_alarms=0.05)
    alarms = [len(find_consensus(faces[names == name], limit).outliers) for name in np.unique(names)]
    assert 0.02 * len(faces) <= sum(alarms) <= 0.08 * len(faces)
    with pytest.raises(InvalidEmbeddings, match="nobody has two faces"):
        calibrate(faces[:1], names[:1])
    with pytest.raises(InvalidEmbeddings, match="expected one name for each of 2 embeddings"):
        calibrate(faces[:2], names[:1])
