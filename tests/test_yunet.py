"""YuNet through ONNX Runtime and through OpenCV: the same faces, from the same file."""

from __future__ import annotations

import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest

from arcface_clients.faces.detect import MODEL_NAME, FaceDetector
from arcface_clients.faces.steps.align import align_face
from arcface_clients.faces.steps.detect import find_faces
from arcface_clients.faces.steps.yunet import NotYuNet, OpenCvYuNet, YuNet, for_any_size, open_yunet
from conftest import REPO
from deadlines import HANG_S

BOTH = pytest.mark.parametrize("opencv", [False, True], ids=["ONNX Runtime", "OpenCV"])


@pytest.fixture(scope="module")
def file(assets: Path) -> Path:
    return assets / "detectors" / MODEL_NAME


@pytest.fixture(scope="module")
def portraits(assets: Path) -> list[np.ndarray]:
    """One photo each of twenty people, 250×250; some show more than one face."""
    folders = sorted((assets / "faces" / "raw250").iterdir())[:20]
    return [cv2.imread(str(sorted(folder.iterdir())[0])) for folder in folders]


def by_place(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows[:, 1].round(1), rows[:, 0].round(1)))]


@pytest.mark.parametrize("min_score", [0.2, 0.7])
def test_both_runtimes_find_the_same_boxes_landmarks_and_scores(
    file: Path, portraits: list[np.ndarray], min_score: float
) -> None:
    ours, theirs = YuNet(str(file)), OpenCvYuNet(str(file))
    group = np.vstack([np.hstack(portraits[i : i + 4]) for i in (0, 4, 8)])
    odd = [portraits[0][:201, :133], cv2.resize(portraits[1], (641, 333)), portraits[3][:60, :90], group]
    for image in [*portraits, *odd]:
        mine, expected = by_place(ours(image, min_score)), by_place(theirs(image, min_score))
        assert mine.shape == expected.shape
        assert np.allclose(mine, expected, atol=0.01)
    assert len(ours(group, 0.7)) >= 12


@BOTH
@pytest.mark.parametrize("shape", [(1, 250), (250, 5), (1, 1), (31, 400)])
def test_there_is_no_face_in_a_strip_of_a_photo(
    file: Path, portraits: list[np.ndarray], shape: tuple[int, int], opencv: bool
) -> None:
    """OpenCV by itself finds one there now and then, in memory that an earlier look has left."""
    for _ in range(4):
        for image in portraits:
            look = open_yunet(str(file), opencv=opencv)
            look(image, 0.7)
            assert len(look(image[: shape[0], : shape[1]], 0.7)) == 0


def test_an_embedding_does_not_depend_on_the_runtime_of_the_detector(
    file: Path, portraits: list[np.ndarray], assets: Path
) -> None:
    session = onnxruntime.InferenceSession(str(assets / "models" / "MobileFaceNet.onnx"))

    def embedding(crop: np.ndarray) -> np.ndarray:
        rgb = (crop[..., ::-1] / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        (row,) = session.run(None, {"input0": rgb.transpose(2, 0, 1)[None].astype(np.float32)})[0]
        return np.asarray(row / np.linalg.norm(row))

    ways = [open_yunet(str(file), opencv=opencv) for opencv in (False, True)]
    for image in portraits:
        found = [[align_face(image, row[4:14].reshape(5, 2)) for row in find_faces(way, image)] for way in ways]
        assert len(found[0]) == len(found[1])
        for mine, theirs in zip(*found, strict=True):
            assert embedding(mine) @ embedding(theirs) >= 0.9999


def test_the_rewritten_file_differs_in_its_declared_shapes_only(file: Path) -> None:
    before, after = onnx.load(str(file)), onnx.load_from_string(for_any_size(file.read_bytes()))
    assert [d.dim_param for d in after.graph.input[0].type.tensor_type.shape.dim] == ["n", "c", "h", "w"]
    assert {output.name for output in after.graph.output} == {output.name for output in before.graph.output}
    for model in (before, after):
        for field in ("input", "output", "value_info"):
            model.graph.ClearField(field)
    assert after.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


@BOTH
@pytest.mark.parametrize("share", [0, 0.001, 0.4, 0.9999])
def test_a_cut_file_is_refused(file: Path, tmp_path: Path, share: float, opencv: bool) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(NotYuNet, match=r"."):
        open_yunet(str(cut), opencv=opencv)


def test_bytes_that_are_no_fields_are_refused() -> None:
    for data in (b"text of no format", b"\xff" * 40, b"\x3a\x05abc", b"\x0b"):
        with pytest.raises(ValueError, match="ONNX"):
            for_any_size(data)


@BOTH
def test_the_detector_of_a_pipeline_takes_either(file: Path, portraits: list[np.ndarray], opencv: bool) -> None:
    assert FaceDetector(file, opencv=opencv).detect(portraits[0])


FAULTS = """
import resource, sys
import cv2
from yunet import open_yunet
look, image = open_yunet(sys.argv[1]), cv2.imread(sys.argv[2])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    look(image, 0.7)
before = faults()
for _ in range(40):
    look(image, 0.7)
print((faults() - before) / 40)
"""


@pytest.mark.skipif(find_library("jemalloc") is None, reason="jemalloc is not installed: apt-get install libjemalloc2")
def test_a_look_needs_no_fresh_pages_under_the_allocator_of_the_server(file: Path, assets: Path) -> None:
    """Numbers that calloc has zeroed are 192 faults a look, which cost a tenth of a photo."""
    photo = sorted((assets / "faces" / "raw250").glob("*/*.jpg"))[0]
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(file), str(photo)],
        cwd=REPO / "model_repository" / "photo_faces" / "1",
        env={"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1", "LD_PRELOAD": str(find_library("jemalloc"))},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert float(done.stdout) < 40, done.stderr


ALONE = """
import sys
sys.modules["onnxruntime"] = None  # as where it is not installed
import cv2
from detect import find_faces
from yunet import open_yunet
look = open_yunet(sys.argv[1])
print(type(look).__name__, len(find_faces(look, cv2.imread(sys.argv[2]))), "onnx" in sys.modules)
"""


def test_the_served_step_needs_numpy_and_opencv_only(file: Path, assets: Path) -> None:
    photo = sorted((assets / "faces" / "raw250").glob("*/*.jpg"))[0]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(file), str(photo)],
        cwd=REPO / "model_repository" / "photo_faces" / "1",
        env={"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    name, faces, onnx_loaded = done.stdout.split()
    assert (name, onnx_loaded) == ("OpenCvYuNet", "False"), done.stderr
    assert int(faces) >= 1
