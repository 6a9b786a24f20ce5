"""Photos in, aligned faces out: template, several faces, EXIF, and files that must not stop a run."""

from __future__ import annotations

import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from arcface_clients.errors import ConfigError, DependencyMissing, InvalidFaces
from arcface_clients.faces.detect import MODEL_NAME, FaceDetector, detect_crops, find_detector, load_detected
from arcface_clients.faces.photos import read_photo
from arcface_clients.faces.steps.align import TEMPLATE, align_face, similarity_to_template


@pytest.fixture(scope="module")
def detector(assets: Path) -> FaceDetector:
    return FaceDetector(assets / "detectors" / MODEL_NAME)


@pytest.fixture(scope="module")
def portraits(assets: Path) -> list[Path]:
    """One photo each of eight people, 250×250."""
    return [sorted(folder.iterdir())[0] for folder in sorted((assets / "faces" / "raw250").iterdir())[:8]]


def landmarks_of(assets: Path, portrait: Path) -> np.ndarray:
    name = f"{portrait.parent.name}/{portrait.name}"
    rows = (assets / "faces" / "index.csv").read_text().splitlines()
    numbers = next(row for row in rows if row.startswith(f"{name},")).split(",")[3:]
    return np.array(numbers, np.float64).reshape(5, 2)


@pytest.mark.parametrize(("angle", "scale", "shift"), [(0, 1, (0, 0)), (33, 2.5, (40, -17)), (180, 0.4, (900, 3))])
def test_the_warp_undoes_any_turn_scale_and_shift(angle: float, scale: float, shift: tuple[float, float]) -> None:
    turn = np.deg2rad(angle)
    rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    moved = TEMPLATE @ rotation.T + shift
    matrix = similarity_to_template(moved)
    assert np.abs(moved @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE).max() < 1e-5  # the template is float32


def test_the_warp_is_insightfaces(assets: Path, portraits: list[Path]) -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    for portrait in portraits:
        image, landmarks = cv2.imread(str(portrait)), landmarks_of(assets, portrait).astype(np.float32)
        theirs = face_align.norm_crop(image, landmarks)
        ours = align_face(image, landmarks)
        np.testing.assert_allclose(similarity_to_template(landmarks), face_align.estimate_norm(landmarks), atol=1e-6)
        assert (ours != theirs).mean() < 1e-4


@pytest.mark.parametrize("bad", [np.ones((5, 2)), np.ones((4, 2)), np.full((5, 2), np.nan)])
def test_landmarks_without_a_shape_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="landmarks"):
        similarity_to_template(bad)


def test_detected_landmarks_lie_where_the_index_says(
    assets: Path, detector: FaceDetector, portraits: list[Path]
) -> None:
    for portrait in portraits:
        faces = detector.detect(read_photo(portrait))
        expected = landmarks_of(assets, portrait)
        off = min(np.linalg.norm(face.landmarks - expected, axis=1).mean() for face in faces)
        assert off < 0.2 * np.linalg.norm(expected[0] - expected[1])
        assert faces[0].face.shape == (112, 112, 3)


def test_several_faces_in_one_photo_are_all_found_wherever_they_are(
    detector: FaceDetector, portraits: list[Path]
) -> None:
    group = np.vstack([np.hstack([cv2.imread(str(p)) for p in portraits[i : i + 4]]) for i in (0, 4)])
    faces = detector.detect(group)
    cells = {(int(f.box[0] + f.box[2] / 2) // 250, int(f.box[1] + f.box[3] / 2) // 250) for f in faces}
    assert cells == {(x, y) for x in range(4) for y in range(2)}
    scores = [face.score for face in faces]
    assert scores == sorted(scores, reverse=True)


def test_a_large_photo_gives_the_same_face_as_the_small_one(detector: FaceDetector, portraits: list[Path]) -> None:
    image = cv2.imread(str(portraits[2]))
    small = detector.detect(image)[0]
    large = detector.detect(cv2.resize(image, None, fx=12, fy=12, interpolation=cv2.INTER_CUBIC))[0]
    assert np.abs(large.landmarks / 12 - small.landmarks).max() < 6
    assert np.abs(large.face.astype(int) - small.face.astype(int)).mean() < 12


def test_a_face_at_the_end_of_a_panorama_is_found_and_aligned_as_anywhere(
    detector: FaceDetector, portraits: list[Path]
) -> None:
    """OpenCV warps no image with a side of more than 32,766 pixels."""
    portrait = cv2.resize(cv2.imread(str(portraits[0])), (1000, 1000), interpolation=cv2.INTER_CUBIC)
    panorama = np.full((1000, 33_000, 3), 90, np.uint8)
    panorama[:, -1000:] = portrait
    (found,) = detector.detect(panorama)
    alone = align_face(portrait, found.landmarks - np.float32([32_000, 0]))
    assert np.abs(found.face.astype(int) - alone).mean() < 0.5
    on_its_side = found.landmarks[:, ::-1] * [1, -1] + [0, 33_000 - 1]
    assert np.abs(align_face(np.rot90(panorama).copy(), on_its_side).astype(int) - alone).mean() < 0.5


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(
    detector: FaceDetector, portraits: list[Path], tmp_path: Path, orientation: int
) -> None:
    upright = Image.open(portraits[1])
    turned = upright.rotate({1: 0, 3: 180, 6: 90, 8: 270}[orientation], expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "photo.jpg", exif=exif, quality=97)
    image = read_photo(tmp_path / "photo.jpg")
    assert np.abs(image.astype(int) - read_photo(portraits[1]).astype(int)).mean() < 4
    assert len(detector.detect(image)) == len(detector.detect(read_photo(portraits[1])))


def test_grey_palette_alpha_cmyk_and_16_bit_images_become_bgr(portraits: list[Path], tmp_path: Path) -> None:
    photo = Image.open(portraits[0])
    grey = np.asarray(photo.convert("L"))
    for name, image in {
        "grey.png": photo.convert("L"),
        "palette.gif": photo.quantize(256),
        "alpha.png": photo.convert("RGBA"),
        "cmyk.jpg": photo.convert("CMYK"),
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
    }.items():
        image.save(tmp_path / name)
        pixels = read_photo(tmp_path / name)
        assert pixels.shape == (250, 250, 3)
        assert np.abs(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY).astype(int) - grey.astype(int)).mean() < 8, name


def test_what_cannot_be_used_is_reported_and_the_rest_goes_on(
    detector: FaceDetector, portraits: list[Path], tmp_path: Path
) -> None:
    alone = next(p for p in portraits if len(detector.detect(read_photo(p))) == 1)
    whole = alone.read_bytes()
    (tmp_path / "a_good.jpg").write_bytes(whole)
    (tmp_path / "b_cut_off.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c_text.jpg").write_text("no image at all")
    (tmp_path / "d_empty.png").write_bytes(b"")
    cv2.imwrite(str(tmp_path / "e_nobody.png"), np.full((300, 300, 3), 127, np.uint8))
    Image.new("1", (10_000, 8_500)).save(tmp_path / "f_huge.png")
    Image.new("1", (20_000, 9_000)).save(tmp_path / "f_vast.png")
    (tmp_path / "g_damaged.png").write_bytes((tmp_path / "e_nobody.png").read_bytes()[:60] + bytes(200))
    np.save(tmp_path / "h_array.npy", np.zeros((1, 112, 112, 3), np.uint8))
    (tmp_path / "i_good.jpg").write_bytes(whole)
    faces, names, refused = load_detected([tmp_path], detector)
    assert [Path(name).name for name in names] == ["a_good.jpg[0]", "i_good.jpg[0]"]
    assert np.array_equal(faces[0], faces[1])
    reasons = {Path(crop.name).name: crop.refused for crop in refused}
    assert reasons["b_cut_off.jpg"].startswith("damaged or truncated (image file is truncated")
    assert reasons["c_text.jpg"] == reasons["d_empty.png"] == "not an image, or of a format that is not read"
    assert reasons["e_nobody.png"] == "no face found (score of at least 0.7)"
    assert reasons["f_huge.png"] == "10000×8500 pixels; expected at most 80,000,000. Shrink it first"
    assert reasons["f_vast.png"].startswith("too large")
    assert reasons["g_damaged.png"].startswith("damaged or truncated")
    assert reasons["h_array.npy"].startswith("an array of crops")
    missing = list(detect_crops([str(tmp_path / "nowhere.jpg")], detector))
    assert missing[0].refused == "No such file or directory"


def test_threads_share_a_detector(detector: FaceDetector, portraits: list[Path]) -> None:
    images = [read_photo(p) for p in portraits]
    alone = [[face.box for face in detector.detect(image)] for image in images]
    together: dict[int, list] = {}

    def work(i: int) -> None:
        together[i] = [face.box for face in detector.detect(images[i])]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(8)] == alone


def test_a_missing_detector_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ARCFACE_DETECTOR", raising=False)
    with pytest.raises(DependencyMissing, match=r"no face detector at .*detectors/face_detection_yunet_2023mar\.onnx"):
        find_detector()
    monkeypatch.setenv("ARCFACE_DETECTOR", str(tmp_path / "mine.onnx"))
    with pytest.raises(DependencyMissing, match=r"mine\.onnx"):
        find_detector()


def test_a_file_that_is_no_detector_and_a_wrong_image_are_refused(detector: FaceDetector, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(ConfigError, match="is not a detector that can be run as YuNet"):
        FaceDetector(tmp_path / "other.onnx")
    with pytest.raises(InvalidFaces, match="expected an image uint8"):
        detector.detect(np.zeros((10, 10), np.uint8))
