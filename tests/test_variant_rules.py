"""The rules behind variants, as tables: the set a search ends with, what the gate lets through, what faces are read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from arcface_build.imports.proof_faces import read_faces
from arcface_build.variants.eval_set import FaceSet, evaluation_faces
from arcface_build.variants.gate import judge_variant
from arcface_build.variants.int8 import quantize_convolutions
from arcface_build.variants.recipe import load_recipe
from arcface_build.variants.search import order_to_keep, smallest_passing_set
from arcface_clients.errors import Missing, WrongUse
from arcface_clients.faces.synthetic import synthetic_faces
from damaged_arrays import DAMAGED_ARRAYS, write_damaged
from tiny_nets import tiny_net

SENSITIVITY = {"a": 8e-3, "b": 4e-3, "c": 2e-3, "d": 1e-3, "e": 5e-4}
FACES = FaceSet("t", np.zeros((4, 1), np.uint8), ["one", "two", "three", "four"], None)


def verdict_of(drift: float, limit: float):
    angle = np.arccos(1 - drift)
    reference = np.tile([1.0, 0.0], (4, 1))
    return judge_variant(
        "onnxruntime", "int8", {"int8": limit}, reference, np.tile([np.cos(angle), np.sin(angle)], (4, 1)), FACES
    )


@pytest.mark.parametrize(
    ("limit", "factor", "kept"),
    [
        (0.008, 1.0, "a"),  # 7.5e-3 left
        (0.007, 1.0, "ab"),
        (0.0034, 1.0, "abc"),
        (0.0034, 0.9, "ab"),  # real drift is smaller than the sum: fewer are kept than predicted
        (0.0016, 2.0, "abcd"),  # and larger
        (1e-9, 1.0, "abcde"),
    ],
)
def test_search_ends_with_the_smallest_prefix_that_passes(limit, factor, kept):
    def attempt(keep):
        return verdict_of(factor * sum(v for k, v in SENSITIVITY.items() if k not in keep), limit)

    result = smallest_passing_set(SENSITIVITY, dict.fromkeys(SENSITIVITY, 1.0), attempt)
    assert "".join(result.keep) == kept
    assert len(result.attempts) <= 5


def test_search_says_so_when_keeping_everything_fails():
    result = smallest_passing_set(SENSITIVITY, dict.fromkeys(SENSITIVITY, 1.0), lambda keep: verdict_of(0.5, 0.01))
    assert result.keep is None
    assert result.attempts[-1].kept == len(SENSITIVITY)


def test_layers_that_must_stay_are_in_every_attempt():
    tried = []

    def attempt(keep):
        tried.append(tuple(keep))
        return verdict_of(0.02 if len(keep) < 3 else 0.001, 0.01)

    result = smallest_passing_set(SENSITIVITY, dict.fromkeys(SENSITIVITY, 1.0), attempt, always=["e"])
    assert result.keep == ("e", "a", "b")
    assert all(keep[0] == "e" for keep in tried)


def test_cheap_layers_are_kept_before_dear_ones():
    assert order_to_keep({"dear": 3e-3, "cheap": 1e-3, "idle": 0.0}, {"dear": 100.0, "cheap": 1.0, "idle": 1.0}) == [
        "cheap",
        "dear",
        "idle",
    ]


@pytest.mark.parametrize(("drift", "passed"), [(0.0099, True), (0.0101, False)])
def test_gate_is_on_the_worst_face(drift, passed):
    reference = np.eye(4)
    candidate = np.eye(4)
    candidate[2] = [0, np.sqrt(1 - (1 - drift) ** 2), 1 - drift, 0]
    verdict = judge_variant("onnxruntime", "int8", {"int8": 0.01}, reference, candidate, FACES)
    assert verdict.passed is passed
    assert verdict.gate.report.worst_faces[0].name == "three"
    assert verdict.gate.faces_over == (0 if passed else 1)


def test_embeddings_with_nan_or_zero_rows_are_refused():
    for bad in (np.nan, 0.0):
        candidate = np.eye(4)
        candidate[1] = bad
        verdict = judge_variant("onnxruntime", "int8", {"int8": 0.01}, np.eye(4), candidate, FACES)
        assert not verdict.passed
        assert verdict.gate.report.worst_faces[0].name == "two"


def test_changed_verification_accuracy_is_refused_though_no_face_drifts_far():
    def at(*degrees):
        radians = np.deg2rad(degrees)
        return np.stack([np.cos(radians), np.sin(radians)], axis=1)

    views = np.arange(8) / 2  # eight views each, half a degree apart; the other person is ten degrees away
    before = np.concatenate([views, views + 10])
    after = before + np.where((np.arange(16) < 8) & (np.arange(16) % 2 == 0), 8, 0)  # half of the first's move near
    people = FaceSet("t", np.zeros((16, 1), np.uint8), [str(i) for i in range(16)], np.repeat(["a", "b"], 8))
    verdict = judge_variant("onnxruntime", "int8", {"int8": 0.05}, at(*before), at(*after), people)
    assert verdict.max_drift < 0.05
    assert verdict.decisions.accuracy_reference == 1.0
    assert verdict.decisions.accuracy_candidate < 0.9
    assert not verdict.passed
    assert "against 100.00% in fp32, allowed ±1.79%" in verdict.why


def test_refusal_tells_by_how_much_and_which_faces():
    assert verdict_of(0.025, 0.01).why == (
        "drift 0.025, 2.5 × the limit 0.01 for int8, on 4 of 4 faces; "
        "worst: one (0.025), two (0.025), three (0.025), four (0.025)"
    )


def test_folder_of_people_gives_identities_and_a_stable_digest(tmp_path):
    cv2 = pytest.importorskip("cv2")
    for i, face in enumerate(synthetic_faces(6)):
        (tmp_path / f"person{i % 3}").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"person{i % 3}" / f"{i}.png"), face)
    found = evaluation_faces(str(tmp_path), 100)
    assert list(found.identities) == ["person0", "person0", "person1", "person1", "person2", "person2"]
    assert found.faces.shape == (6, 112, 112, 3)
    assert found.sha256 == evaluation_faces(str(tmp_path), 100).sha256
    assert len(evaluation_faces(str(tmp_path), 4).faces) == 4
    cv2.imwrite(str(tmp_path / "person0" / "big.png"), np.zeros((250, 250, 3), np.uint8))
    with pytest.raises(WrongUse, match=r"big.png: expected an aligned crop of 112×112 pixels, got 250×250; expected"):
        evaluation_faces(str(tmp_path), 100)


def test_faces_that_are_not_there_or_not_faces_are_refused(tmp_path):
    with pytest.raises(Missing, match="no faces at nowhere: expected a folder"):
        evaluation_faces("nowhere", 4)
    with pytest.raises(Missing, match="no pictures"):
        evaluation_faces(str(tmp_path), 4)
    np.savez(tmp_path / "x.npz", crops=np.zeros(3))
    with pytest.raises(
        WrongUse, match=r"x.npz: expected an array `faces` in it, found: crops; expected .* an .npz with"
    ):
        evaluation_faces(str(tmp_path / "x.npz"), 4)


@pytest.mark.parametrize("damage", DAMAGED_ARRAYS)
def test_a_damaged_file_of_faces_is_refused_in_one_sentence(damage, tmp_path):
    path = write_damaged(tmp_path / "faces.npz", damage)
    with pytest.raises(WrongUse, match=r"faces\.npz: .*expected .* an \.npz with `faces`"):
        evaluation_faces(str(path), 4)
    with pytest.raises(WrongUse, match=r"faces\.npz is not a crop: "):
        read_faces(path)


@pytest.mark.parametrize("identities", [np.arange(1), np.zeros((2, 2)), np.array([None, None], object)])
def test_identities_that_do_not_fit_the_faces_are_refused(identities, tmp_path):
    np.savez(tmp_path / "x.npz", faces=synthetic_faces(2), identities=identities)
    with pytest.raises(WrongUse, match=r"an \.npz with `faces` .*, and perhaps `identities` \(N,\)"):
        evaluation_faces(str(tmp_path / "x.npz"), 4)


def test_drawn_calibration_faces_are_not_those_that_judge():
    judged, calibrated = evaluation_faces("synthetic", 8), evaluation_faces("synthetic", 8, seed=1)
    assert judged.sha256 != calibrated.sha256
    assert list(judged.identities) == [0, 0, 0, 0, 1, 1, 1, 1]


GOOD_RECIPE = {"format": 1, "precision": "int8", "target": "cpu", "serving_sha256": "ab", "keep": [], "ranges": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranges": 3}, "is not a recipe of format 1"),
        ({"ranges": {"cpu": {"x": "a"}}}, "is not a recipe of format 1"),
        ({"ranges": {"cpu": {"x": [0, "one"]}}}, "is not a recipe of format 1"),
        ({"keep": None}, "is not a recipe of format 1"),
        ({"format": 2}, "is not a recipe of format 1"),
        ({"serving_sha256": 3}, "was made for another serving ONNX"),
        ({"ranges": {"tensorrt": {}}}, "makes int8 for tensorrt, not int8 for cpu"),
    ],
)
def test_a_recipe_that_cannot_be_replayed_is_refused(change, message, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**GOOD_RECIPE, **change}))
    with pytest.raises(WrongUse, match=message):
        load_recipe(path, "int8", "cpu", "ab")


def test_ranges_that_miss_a_convolution_are_refused():
    with pytest.raises(WrongUse, match=r"no range for the input of \d+ of \d+ convolutions, such as \S+\. Leave out"):
        quantize_convolutions(named_tiny_net(), {}, "cpu")


def named_tiny_net():
    model = tiny_net()
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"n{number}"
    return model
