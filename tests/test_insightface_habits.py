"""Code written for InsightFace's FaceAnalysis runs unchanged on a served model, and gets the same embeddings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcface_build.serving.process import TritonProcess
from arcface_clients import FakeEmbedder, TritonEmbedder
from arcface_clients.errors import ConfigError, InvalidFaces, ServerUnreachable
from arcface_clients.evidence.drift import compare_embeddings
from arcface_clients.faces.detect import FaceDetector
from arcface_clients.faces.photos import read_photo
from arcface_clients.faces.steps.align import TEMPLATE
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.insightface import Recognition, analyse_many

PHOTOS = 30
DETECTOR = "face_detection_yunet_2023mar.onnx"


class YuNet:
    """Our detector behind the interface of InsightFace's: SCRFD's weights are not among the test data."""

    taskname = "detection"

    def __init__(self, model: Path) -> None:
        self.detector = FaceDetector(model, refine=False)

    def prepare(self, ctx_id: int, **_: object) -> None:
        """Nothing to choose."""

    def detect(self, img: np.ndarray, max_num: int = 0, metric: str = "default") -> tuple[np.ndarray, np.ndarray]:
        faces = self.detector.detect(img)[: max_num or None]
        boxes = [(x, y, x + w, y + h, face.score) for face in faces for x, y, w, h in [face.box]]
        return (
            np.array(boxes, np.float32).reshape(-1, 5),
            np.array([face.landmarks for face in faces], np.float32).reshape(-1, 5, 2),
        )


@pytest.fixture(scope="module")
def app(assets: Path, demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """InsightFace's own FaceAnalysis, made from a folder as users make it, with the served demo network in it."""
    analysis = pytest.importorskip("insightface.app")
    folder = tmp_path_factory.mktemp("pack")
    (source,) = (demo_repository.parent / "models").glob("*/source.onnx")
    shutil.copyfile(source, folder / "w600k.onnx")
    shutil.copyfile(assets / "detectors" / DETECTOR, folder / "det.onnx")
    made = analysis.FaceAnalysis(name=str(folder), providers=["CPUExecutionProvider"])
    assert sorted(made.models) == ["detection", "recognition"]
    made.det_model = made.models["detection"] = YuNet(folder / "det.onnx")
    made.prepare(ctx_id=-1)
    return made


@pytest.fixture(scope="module")
def photos(assets: Path) -> list[np.ndarray]:
    """Thirty photos: twenty-nine of a person each, and one of two."""
    files = sorted((assets / "faces" / "raw250").glob("*/*.jpg"))[: PHOTOS + 1]
    images = [read_photo(file) for file in files]
    return [*images[: PHOTOS - 1], np.concatenate(images[-2:], axis=1)]


@pytest.fixture(scope="module")
def in_process(app: Any, photos: list[np.ndarray]) -> list[list[Any]]:
    """What InsightFace finds by itself."""
    return [app.get(photo) for photo in photos]


@pytest.fixture
def served(app: Any, server: TritonProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same application after the one line that README shows."""
    with Recognition(server.grpc_url) as recognition:
        monkeypatch.setitem(app.models, "recognition", recognition)
        app.prepare(ctx_id=0)
        yield app


def embeddings_of(found: list[list[Any]]) -> np.ndarray:
    return np.stack([face.embedding for faces in found for face in faces])


def test_thirty_photos_side_by_side_have_the_same_embeddings_and_the_same_norms(
    in_process: list[list[Any]], served: Any, photos: list[np.ndarray]
) -> None:
    found = [served.get(photo) for photo in photos]
    assert [len(faces) for faces in found] == [len(faces) for faces in in_process]
    assert sum(map(len, found)) > PHOTOS
    expected, got = embeddings_of(in_process), embeddings_of(found)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert compare_embeddings(expected, got).min_cosine >= 0.99999
    for one, other in zip(chain(*in_process), chain(*found), strict=True):
        assert other.embedding_norm == pytest.approx(one.embedding_norm, rel=1e-4)
        np.testing.assert_allclose(other.normed_embedding, one.normed_embedding, atol=1e-3)


def test_the_model_answers_as_insightfaces_does(app: Any, server: TritonProcess) -> None:
    theirs, faces = app.models["recognition"], list(synthetic_faces(3))
    large = np.repeat(np.repeat(faces[0], 2, axis=0), 2, axis=1)  # 224×224
    blob = np.stack(faces)[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)
    with Recognition(server.grpc_url) as ours:
        for name in ("taskname", "input_size", "input_mean", "input_std"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert tuple(ours.input_shape[1:]) == tuple(theirs.input_shape[1:])
        assert ours.output_shape[-1] == theirs.output_shape[-1]
        ours.prepare(-1)
        for one, other in [
            (theirs.get_feat(faces), ours.get_feat(faces)),
            (theirs.get_feat(faces[0]), ours.get_feat(faces[0])),
            (theirs.get_feat([large]), ours.get_feat([large])),
            (theirs.forward(blob), ours.forward(blob)),
        ]:
            assert (other.shape, other.dtype) == (one.shape, one.dtype)
            np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3 * np.linalg.norm(one, axis=1).max())
        a, b = ours.get_feat(faces[:2])
        assert ours.compute_sim(a, b) == pytest.approx(theirs.compute_sim(a, b), abs=1e-6)
        assert ours.get_feat([]).shape == (0, theirs.output_shape[-1])


def test_analyse_many_gives_what_get_gives_photo_by_photo(
    in_process: list[list[Any]], served: Any, photos: list[np.ndarray]
) -> None:
    empty = np.zeros((120, 120, 3), np.uint8)
    before = served.models["recognition"]
    found = list(analyse_many(served, [empty, *photos[:15], empty, empty, *photos[15:], empty]))
    assert [found[i] for i in (0, 16, 17, -1)] == [[], [], [], []]
    found = [*found[1:16], *found[18:-1]]
    assert [len(faces) for faces in found] == [len(faces) for faces in in_process]
    expected, got = embeddings_of(in_process), embeddings_of(found)
    assert compare_embeddings(expected, got).min_cosine >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)
    assert served.models["recognition"] is before, "the application is left as it was"
    assert list(analyse_many(served, [empty])) == [[]]
    assert list(analyse_many(served, [])) == []


class OneFaceEach:
    """Stands for FaceAnalysis: `faces` faces in every photo, landmarks on the template."""

    def __init__(self, recognition: object, faces: int = 1) -> None:
        self.models, self.faces = {"recognition": recognition}, faces

    def get(self, img: np.ndarray) -> list[Any]:
        class Face:
            kps = TEMPLATE

        found = [Face() for _ in range(self.faces)]
        for face in found:
            self.models["recognition"].get(img, face)
        return found


def test_analyse_many_fills_its_batches_across_photos() -> None:
    fake = FakeEmbedder(max_batch_size=8)
    crops = synthetic_faces(10)
    found = list(analyse_many(OneFaceEach(Recognition(fake), faces=2), iter(crops)))
    assert fake.calls == [8, 8, 4]
    assert [len(faces) for faces in found] == [2] * 10
    with FakeEmbedder() as plain:
        np.testing.assert_allclose(
            [np.divide(faces[1].embedding, np.linalg.norm(faces[1].embedding)) for faces in found],
            plain.encode(crops),
            atol=1e-5,
        )


def test_analyse_many_says_which_photo_could_not_be_read_and_which_model_it_needs(tmp_path: Path) -> None:
    app = OneFaceEach(Recognition(FakeEmbedder()))
    with pytest.raises(InvalidFaces, match=r"photo 1 is NoneType: expected an image uint8 \(H, W, 3\) BGR"):
        list(analyse_many(app, [synthetic_faces(1)[0], None]))  # what cv2.imread returns for a file it cannot read
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(InvalidFaces, match=r"broken\.jpg: not an image"):
        list(analyse_many(app, [tmp_path / "broken.jpg"]))
    with pytest.raises(ConfigError, match=r"app\.models\['recognition'\] is object; expected"):
        list(analyse_many(OneFaceEach(object()), []))


def test_a_server_that_is_away_is_noticed_by_prepare() -> None:
    with pytest.raises(ServerUnreachable):
        Recognition(TritonEmbedder("127.0.0.1:1", retry_for_s=0)).prepare(ctx_id=0)


def test_a_face_without_landmarks_is_refused_in_words() -> None:
    class Face:
        kps = None

    with pytest.raises(InvalidFaces, match=r"the face has no landmarks \(kps\)"):
        Recognition(FakeEmbedder()).get(synthetic_faces(1)[0], Face())
