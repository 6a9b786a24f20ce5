"""Recognition figures on made-up scores with known answers, and on real faces with the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from arcface_clients.errors import InvalidFaces
from arcface_clients.evidence.accuracy import (
    Pairs,
    best_threshold,
    changed_decisions,
    fold_accuracies,
    measure_accuracy,
    pairs_from_csv,
    pairs_from_identities,
    rank1,
)


def scored(genuine: list[float], impostor: list[float]) -> tuple[np.ndarray, Pairs]:
    """Embeddings in a plane, one pair of rows for each wanted cosine."""
    cosines = np.array([*genuine, *impostor])
    first = np.tile([1.0, 0.0], (len(cosines), 1))
    second = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    rows = np.arange(len(cosines))
    same = np.arange(len(cosines)) < len(genuine)
    return np.concatenate([first, second]), Pairs(rows, rows + len(rows), same)


def test_parted_scores_give_no_errors():
    embeddings, pairs = scored([0.6] * 20 + [0.7] * 20, [0.1] * 20 + [0.2] * 20)
    report = measure_accuracy(embeddings, pairs, resamples=20)
    assert (report.auc, report.eer.value, report.fold_accuracy) == (1.0, 0.0, 1.0)
    assert 0.2 < report.fold_threshold < 0.6
    assert report.tar_at_far["0.1"].value == 1.0
    assert "0.001" not in report.tar_at_far, "40 impostor pairs cannot show one false accept in a thousand"
    assert report.rank1 is None


def test_equal_error_rate_is_where_both_errors_meet():
    # One of ten genuine pairs scores below, one of ten impostors above all others: 10 % and 10 %.
    embeddings, pairs = scored([0.0] + [0.6] * 9, [0.9] + [0.1] * 9)
    report = measure_accuracy(embeddings, pairs, resamples=200)
    assert report.eer.value == pytest.approx(0.1)
    assert report.eer.low <= 0.1 <= report.eer.high
    assert report.eer.high > report.eer.low


def test_best_threshold_lies_half_way_between_the_scores_that_it_parts():
    scores, same = np.array([0.1, 0.2, 0.5, 0.9]), np.array([False, False, True, True])
    assert best_threshold(scores, same) == pytest.approx(0.35)
    assert best_threshold(scores, ~same) in (pytest.approx(0.1), pytest.approx(0.900001))


def test_fold_accuracy_never_sees_its_own_fold():
    rng = np.random.default_rng(0)
    scores, same = rng.normal(size=400), rng.random(400) < 0.5
    accuracy, error, _ = fold_accuracies(scores, same)
    assert abs(accuracy - 0.5) < 0.1, "on noise, a threshold that saw its test fold would look better than chance"
    assert 0 < error < 0.05


def test_rank1_asks_only_people_with_two_faces():
    embeddings = np.array([[1, 0], [0.99, 0.1], [0, 1], [0.1, 0.99], [0.7, 0.7]])
    assert rank1(embeddings, np.array(["a", "a", "b", "b", "alone"])) == 1.0
    assert rank1(embeddings, np.array(["a", "b", "a", "b", "alone"])) == 0.0
    apart = np.array([[1, 0], [-1, 0], [-0.1, 0.99]])
    assert rank1(apart, np.array(["a", "a", "b"])) == 0.0, "a face is never its own match, even where all are unlike it"
    with pytest.raises(InvalidFaces, match="at least one person with two faces"):
        rank1(embeddings, np.array(list("abcde")))


def test_changed_decisions_name_the_clearest_change_first():
    before, pairs = scored([0.31, 0.6, 0.33], [0.1, 0.29])
    after, _ = scored([0.29, 0.6, 0.2], [0.1, 0.28])
    changed = changed_decisions(before, after, pairs, 0.3)
    assert (changed.changed, changed.changed_pairs) == (2, [2, 0])
    assert (changed.accuracy_reference, changed.accuracy_candidate) == (1.0, 0.6)


def test_pairs_are_matched_by_the_end_of_the_path(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("a,b,same\nann/1.jpg,ann/2.jpg,1\nann/1.jpg,bob/1.jpg,0\n")
    pairs = pairs_from_csv(file, ["/data/ann/1.jpg", "/data/ann/2.jpg", "/data/bob/1.jpg"])
    assert (pairs.a.tolist(), pairs.b.tolist(), pairs.same.tolist()) == ([0, 0], [1, 2], [True, False])
    assert pairs.identities.tolist() == ["ann", "ann", "bob"]
    with pytest.raises(InvalidFaces, match=r"names 1 faces that do not exist, such as bob/1\.jpg"):
        pairs_from_csv(file, ["ann/1.jpg", "ann/2.jpg"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b,same\n",
        b"x;y\n1;2\n",
        b"ann/1.jpg,ann/2.jpg\nann/1.jpg,ann/2.jpg\n",
        b"a,b,same\na,b,yes\n",
        b"\xff\xfe",
    ],
)
def test_what_is_no_file_of_pairs_is_refused(content, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_bytes(content)
    with pytest.raises(
        InvalidFaces, match=r"pairs\.csv (contains no pairs|contains the line .*|is not text): expected .*a,b,same"
    ):
        pairs_from_csv(file, ["ann/1.jpg", "ann/2.jpg"])


def test_pairs_from_folders_hold_all_genuine_pairs_and_as_many_impostors():
    pairs = pairs_from_identities(["a"] * 3 + ["b"] * 3 + ["c"] * 2)
    assert (pairs.same.sum(), (~pairs.same).sum()) == (7, 7)
    with pytest.raises(InvalidFaces, match="needs pairs of one person and pairs of two: got 0 and 0"):
        pairs_from_identities(["a", "b", "c"])


def test_mobilefacenet_reaches_its_published_figures(assets, mobilefacenet_embeddings):
    names, embeddings = mobilefacenet_embeddings
    report = measure_accuracy(embeddings, pairs_from_csv(assets / "faces" / "pairs.csv", names), resamples=50)
    assert report.genuine_mean == pytest.approx(0.641, abs=1e-3)
    assert report.impostor_mean == pytest.approx(0.014, abs=1e-3)
    assert report.eer.value == pytest.approx(0.0107, abs=1e-4)
    assert report.rank1 == pytest.approx(0.9975, abs=1e-6)


@pytest.fixture(scope="module")
def mobilefacenet_embeddings(assets, lfw_faces):
    """(names, embeddings) of the 400 crops through MobileFaceNet with its own preprocessing."""
    import onnxruntime

    from arcface_clients.contract import Preprocessing

    names = [row.split(",")[0] for row in (assets / "faces" / "index.csv").read_text().splitlines()[1:]]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    imagenet = Preprocessing("rgb", tuple(255 * v for v in mean), tuple(255 * v for v in std))
    session = onnxruntime.InferenceSession(
        str(assets / "models" / "MobileFaceNet.onnx"), providers=["CPUExecutionProvider"]
    )
    blob = imagenet.apply(lfw_faces)
    return names, np.concatenate([session.run(None, {"input0": row[None]})[0] for row in blob])
