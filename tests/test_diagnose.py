"""Planted faults are named from embeddings alone; the network is the mobile demo, on drawn faces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from arcface_build.compare.reference import reference_network
from arcface_clients.contract import Preprocessing
from arcface_clients.errors import InvalidFaces
from arcface_clients.evidence.diagnose import diagnose, warp
from arcface_clients.faces.synthetic import synthetic_faces

FACES = synthetic_faces(24, seed=5)


@pytest.fixture(scope="module")
def source(demo_repository: Path) -> Path:
    return next((demo_repository.parent / "models").glob("*/source.onnx"))


@pytest.fixture(scope="module")
def reference(source: Path):
    """(embed(preprocessing, faces) → unit rows, network, its preprocessing)."""
    network, stated = reference_network(source)

    def embed(preprocessing: Preprocessing = stated, faces: np.ndarray = FACES) -> np.ndarray:
        raw = network(preprocessing.apply(faces))
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)

    return embed, network, stated


def found(reference, candidate: np.ndarray, encode=None) -> list[tuple[str, str]]:
    _, network, stated = reference
    return [(f.fault, f.sentence) for f in diagnose(FACES, candidate, network, stated, encode)]


def test_nothing_is_found_where_nothing_is_wrong(reference):
    embed, _, _ = reference
    assert found(reference, embed(), embed_faces(embed)) == []


def embed_faces(embed):
    return lambda faces: embed(faces=faces)


@pytest.mark.parametrize(
    ("change", "fault", "words"),
    [
        ({"color": "bgr"}, "channels swapped", "the network expects RGB and gets BGR"),
        ({"std": (128.0,) * 3}, "wrong scale", "divided by 128 instead of 127.5 (/128 for /127.5)"),
        ({"mean": (0.0,) * 3, "std": (1.0,) * 3}, "missing normalisation", "the network gets 0..255"),
        (
            {"color": "bgr", "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)},
            "channels swapped, wrong numbers",
            "ImageNet's mean and std are used. The network expects mean 127.5, std 127.5",
        ),
    ],
)
def test_wrong_preprocessing_is_said_in_words(reference, change, fault, words):
    embed, _, stated = reference
    ((got, sentence),) = found(reference, embed(replace(stated, **change)))
    assert got == fault
    assert words in sentence


def test_a_crop_cut_by_another_template_is_measured(reference):
    embed, _, _ = reference
    ((fault, sentence),) = found(reference, embed(faces=warp(FACES, 1.0, 4, -8)))
    assert fault == "crop template off"
    assert "shifted by +4 px to the right and -8 px down. " in sentence


def test_embeddings_that_are_not_of_unit_length_are_recognised(reference):
    _, network, stated = reference
    ((fault, sentence),) = found(reference, network(stated.apply(FACES)))
    assert fault == "not L2-normalised"
    assert "expected 1. Divide each by its length." in sentence


def test_two_swapped_faces_are_named_and_the_others_are_left_alone(reference):
    embed, _, _ = reference
    candidate = embed()
    candidate[[3, 17]] = candidate[[17, 3]]
    (first, second) = found(reference, candidate)
    assert first[1].startswith("Row 3 holds the embedding of face 17 (cosine 1.0000 to that face")
    assert second[1].startswith("Row 17 holds the embedding of face 3 ")


def test_one_face_from_another_picture_is_named(reference):
    embed, _, _ = reference
    candidate = embed()
    candidate[5] = embed(faces=synthetic_faces(1, seed=99))[0]
    ((fault, sentence),) = found(reference, candidate)
    assert fault == "one face differs"
    assert sentence.startswith("Face 5 is an outlier")


def test_rows_out_of_order_are_told_with_their_offset(reference):
    embed, _, _ = reference
    ((fault, sentence),) = found(reference, np.roll(embed(), 2, axis=0))
    assert (fault, sentence) == (
        "rows out of order",
        "The rows are out of order: row i holds the embedding of face i-2.",
    )


def test_a_batch_that_mixes_its_rows_is_caught(reference):
    embed, _, _ = reference

    def mixing(faces: np.ndarray) -> np.ndarray:
        rows = embed(faces=faces)
        mixed = rows + 0.02 * rows.mean(axis=0)
        return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)

    ((fault, sentence),) = found(reference, mixing(FACES), mixing)
    assert fault == "batch contamination"
    assert "depends on its neighbours in the batch" in sentence


def test_one_layer_changed_by_one_percent_is_no_preprocessing_fault(reference, source, tmp_path):
    model = onnx.load(source)
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4][10]
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=tuple(weights.dims))
    weights.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(weights) * noise).astype(np.float32), weights.name))
    onnx.save(model, tmp_path / "perturbed.onnx")
    network, _ = reference_network(tmp_path / "perturbed.onnx")
    _, _, stated = reference
    raw = network(stated.apply(FACES))
    ((fault, sentence),) = found(reference, raw / np.linalg.norm(raw, axis=1, keepdims=True))
    assert fault == "weights or precision"
    assert sentence.endswith("Find the layer: arcface compare A.onnx B.onnx --layers")


def test_bad_rows_are_named_and_a_wrong_count_is_refused(reference):
    embed, network, stated = reference
    candidate = embed()
    candidate[7] = np.nan
    ((fault, sentence),) = found(reference, candidate)
    assert (fault, sentence) == ("bad rows", "1 of 24 embeddings are zero or contain NaN, first at row 7.")
    with pytest.raises(InvalidFaces, match=r"expected an embedding for each of 24 faces, got \(23, 512\)"):
        diagnose(FACES, candidate[1:], network, stated)
