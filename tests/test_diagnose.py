"""Planted faults are named from embeddings alone; the network is the mobile demo, on synthetic faces."""

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
from arcface_clients.evidence.diagnose import diagnose, diagnose_embeddings
from arcface_clients.evidence.hypotheses import grey, warp
from arcface_clients.faces.detect import MODEL_NAME, FaceDetector
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


@pytest.mark.parametrize(
    ("change", "fault", "words"),
    [
        (lambda faces: np.rot90(faces, 1, (1, 2)), "crop turned", "turned by a quarter to the left"),
        (lambda faces: np.rot90(faces, 3, (1, 2)), "crop turned", "turned by a quarter to the right"),
        (lambda faces: faces[:, ::-1], "crop turned", "flipped top to bottom"),
        (lambda faces: faces[:, :, ::-1], "crop mirrored", "The crops are mirrored"),
        (grey, "grey input", "lost their colours"),
        (lambda faces: warp(faces, (1.3, 0.8), 0, 0), "square resize", "about 1.3 × as wide and 0.8 × as high"),
    ],
)
def test_a_change_of_the_pictures_is_named(reference, change, fault, words):
    embed, _, _ = reference
    ((got, sentence),) = found(reference, embed(faces=change(FACES)))
    assert got == fault
    assert words in sentence


def test_flipped_signs_are_recognised_without_the_network(reference):
    embed, _, _ = reference
    ((fault, sentence),) = found(reference, -embed())
    assert (fault, "times −1 (mean cosine -1.0000)" in sentence) == ("sign flipped", True)
    assert [f.fault for f in diagnose_embeddings(embed(), -embed())] == ["sign flipped"]


def noisy(rows: np.ndarray, drift: float) -> np.ndarray:
    """Each row moved to 1 − cosine = drift, in a direction of its own."""
    noise = np.random.default_rng(0).normal(size=rows.shape)
    noise -= (noise * rows).sum(axis=1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return (1 - drift) * rows + np.sqrt(1 - (1 - drift) ** 2) * noise


@pytest.mark.parametrize(
    ("drift", "fault"),
    [
        (1e-4, "weights or precision"),
        (5e-3, "same network, coarser numbers"),
        (0.02, "same network, coarser numbers"),
    ],
)
def test_drift_without_structure_is_told_by_its_size_and_no_fault_is_made_up(reference, drift, fault):
    embed, _, _ = reference
    ((got, _),) = found(reference, noisy(embed(), drift))
    assert got == fault


def lfw_cases() -> dict[str, tuple]:
    """name → (change of the crops, fault that must be named)."""
    import cv2

    def each(change):
        return lambda faces: np.stack([change(face) for face in faces])

    def jpeg(quality):
        return each(lambda face: cv2.imdecode(cv2.imencode(".jpg", face, [1, quality])[1], 1))

    small = each(lambda face: cv2.resize(cv2.resize(face, (40, 40), interpolation=cv2.INTER_AREA), (112, 112)))
    return {
        "nothing": (lambda faces: faces, None),
        "grey": (each(lambda face: cv2.cvtColor(cv2.cvtColor(face, 6), 8)), "grey input"),
        "quarter turn": (lambda faces: np.rot90(faces, 1, (1, 2)), "crop turned"),
        "mirrored": (lambda faces: faces[:, :, ::-1], "crop mirrored"),
        "swapped": (lambda faces: faces[..., ::-1], "channels swapped"),
        "moved": (lambda faces: warp(faces, 1.0, 4, -4), "crop template off"),
        "jpeg 90": (jpeg(90), "same network, coarser numbers"),
        "jpeg 40": (jpeg(40), "same network, coarser numbers"),
        "blurred": (each(lambda face: cv2.GaussianBlur(face, (0, 0), 1.2)), "same network, changed input"),
        "small": (small, "same network, changed input"),
    }


LFW_CASES = [*lfw_cases(), "averaged views", "other people", "other network", "boxes resized"]


@pytest.mark.parametrize("case", LFW_CASES)
def test_what_is_known_of_a_real_network_on_lfw_crops_is_said_and_no_more(case, assets, lfw_faces):
    import cv2
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(assets / "models" / "MobileFaceNet.onnx"), options)
    stated = Preprocessing("rgb", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

    def network(blob: np.ndarray) -> np.ndarray:
        return np.concatenate([session.run(None, {"input0": row[None]})[0] for row in blob])

    def embed(pictures: np.ndarray) -> np.ndarray:
        rows = network(stated.apply(pictures))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    rows = np.arange(0, 400, 17)
    faces = lfw_faces[rows]
    if case == "averaged views":
        candidate, fault = embed(faces) + embed(faces[:, :, ::-1]), "same network, coarser numbers"
        candidate /= np.linalg.norm(candidate, axis=1, keepdims=True)
    elif case == "other people":
        strangers = np.setdiff1d(np.arange(400) // 8, rows // 8)  # eight crops each
        candidate, fault = embed(lfw_faces[8 * strangers[: len(rows)]]), "another network"
    elif case == "other network":
        turn = np.linalg.qr(np.random.default_rng(0).normal(size=(128, 128)))[0]
        candidate, fault = embed(faces) @ turn, "another network"
    elif case == "boxes resized":
        detector = FaceDetector(assets / "detectors" / MODEL_NAME, refine=False)
        names = [line.split(",")[0] for line in (assets / "faces" / "index.csv").read_text().splitlines()[1:]]
        boxes = []
        for row in rows:
            photo = cv2.imread(str(assets / "faces" / "raw250" / names[row]))
            x, y, width, height = (int(side) for side in detector.detect(photo)[0].box)
            boxes.append(cv2.resize(photo[max(y, 0) : y + height, max(x, 0) : x + width], (112, 112)))
        candidate, fault = embed(np.stack(boxes)), "square resize"
    else:
        change, fault = lfw_cases()[case]
        candidate = embed(np.ascontiguousarray(change(faces)))
    assert [f.fault for f in diagnose(faces, candidate, network, stated)] == ([fault] if fault else [])


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
