"""Detects and aligns the faces in images with YuNet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from arcface_clients.arrays import Array, FaceArray, FloatArray
from arcface_clients.errors import ConfigError, DependencyMissing, DetectorMismatch, InvalidFaces
from arcface_clients.extras import importing
from arcface_clients.faces.images import ARRAY_SUFFIXES, Crop, Found, find_files, gather
from arcface_clients.faces.photos import opened_photo

MODEL_NAME = "face_detection_yunet_2023mar.onnx"
CACHE = Path("~/.cache/arcface-triton/detectors")
SOURCE = "https://github.com/opencv/opencv_zoo/tree/main/models/face_detection_yunet"


@dataclass(frozen=True)
class DetectedFace:
    """One face of an image; coordinates are in pixels of the upright image."""

    face: Array = field(repr=False)  # uint8 (112,112,3) BGR, aligned
    score: float  # 0..1
    box: tuple[float, float, float, float]  # x, y, width, height
    landmarks: Array = field(repr=False)  # float32 (5,2): eye, eye, nose, mouth corners, from left to right


class FaceDetector:
    """YuNet, in the fastest runtime that is installed; can be used from several threads.

    Attributes:
        model: its file.
        sha256: of that, when it was opened.
    """

    def __init__(
        self,
        model: Path | str | None = None,
        min_score: float = 0.7,
        min_size: int = 16,
        max_side: int = 1280,
        refine: bool = True,
        *,
        opencv: bool = False,
    ) -> None:
        """Find and load the model.

        Args:
            model: YuNet's ONNX; None: $ARCFACE_DETECTOR, else ~/.cache/arcface-triton/detectors/.
            min_score: lowest YuNet score of a face, 0..1.
            min_size: smallest side of a face, in pixels of the image.
            max_side: larger images are shrunk to this for detection; faces are cropped from the full image.
            refine: look at each face again for better landmarks.
            opencv: run it through OpenCV even where ONNX Runtime is installed, which is faster.

        Raises:
            DependencyMissing: no OpenCV, or no model file.
            ConfigError: the file is not YuNet, or a number is out of range.
        """
        if not (0 < min_score < 1 and min_size >= 1 and max_side >= 32):
            raise ConfigError(
                f"expected min_score in (0, 1), min_size of at least 1 and max_side of at least 32, "
                f"got {min_score}, {min_size} and {max_side}."
            )
        self.model = find_detector(model)
        self.sha256 = hashlib.sha256(self.model.read_bytes()).hexdigest()
        self.min_score, self.min_size, self.max_side, self.refine = min_score, min_size, max_side, refine
        from arcface_clients.faces.steps.yunet import NotYuNet, open_yunet

        try:
            self._look = open_yunet(str(self.model), opencv=opencv)
        except NotYuNet as exc:
            raise ConfigError(
                f"{self.model} is not a detector that can be run as YuNet ({exc}): expected {MODEL_NAME} from {SOURCE}"
            ) from exc

    @property
    def detector_id(self) -> str:
        """What decides which faces it finds; see `steps.detect.detector_id`."""
        from arcface_clients.faces.steps.detect import detector_id

        return detector_id(
            "yunet",
            self.sha256,
            self._look.looks if self.refine else 1,
            min_score=self.min_score,
            min_size=self.min_size,
            max_side=self.max_side,
        )

    def detect(self, image_bgr: Array) -> list[DetectedFace]:
        """The faces in an image uint8 (H,W,3) BGR, best score first; an empty list if there are none.

        Raises:
            InvalidFaces: not such an image.
        """
        from arcface_clients.faces.steps.align import align_face

        if image_bgr.ndim != 3 or image_bgr.shape[2] != 3 or image_bgr.dtype != np.uint8 or not image_bgr.size:
            raise InvalidFaces(f"expected an image uint8 (H, W, 3) BGR, got {image_bgr.dtype} {image_bgr.shape}.")
        return [_face(row, align_face(image_bgr, _points(row))) for row in self._rows(image_bgr, 1)]

    def detect_encoded(self, data: bytes) -> list[DetectedFace]:
        """Like `detect`, from a photo's file; a large JPEG is decoded no larger than its faces need.

        Raises:
            InvalidFaces: see `read_photo`.
        """
        from arcface_clients.faces.steps.align import align_face, magnification

        with opened_photo(data) as photo:
            reduction = photo.reduction(self.max_side)
            pixels = photo.pixels(reduction)
            rows = self._rows(pixels, 1 / reduction)
            if reduction > 1:
                finer = photo.finer(reduction, max((magnification(_points(row)) for row in rows), default=0))
                if finer < reduction:  # a face so small that the crop has room for more of the photo's pixels
                    reduction, pixels = finer, photo.pixels(finer)
            return [_face(row, align_face(pixels, _points(row), 1 / reduction)) for row in rows]

    def _rows(self, image_bgr: Array, scale: float) -> FloatArray:
        from arcface_clients.faces.steps.detect import find_faces

        return find_faces(
            self._look,
            image_bgr,
            scale,
            min_score=self.min_score,
            min_size=self.min_size,
            max_side=self.max_side,
            looks=None if self.refine else 1,
        )


def open_detector(model: Path | str, detector_id: str | None, min_score: float = 0.7) -> FaceDetector:
    """The detector of a run, for one of its workers, which may begin long after it. `detector_id`: None: any.

    Raises:
        DetectorMismatch: the file is another one than when the run began.
        What `FaceDetector` raises.
    """
    found = FaceDetector(model, min_score=min_score)
    if detector_id not in (None, found.detector_id):
        raise DetectorMismatch(
            f"{found.model} is {found.detector_id}: expected {detector_id}, with which this run was begun. Put the "
            "former file there, or start over: --force"
        )
    return found


def _points(row: FloatArray) -> FloatArray:
    return row[4:14].reshape(5, 2)


def _face(row: FloatArray, face: FaceArray) -> DetectedFace:
    x, y, width, height = row[:4].tolist()
    return DetectedFace(face, float(row[14]), (x, y, width, height), _points(row))


CROPS_NOT_PHOTOS = "an array of crops, not an image: embed it without --detect"


def find_detector(model: Path | str | None = None) -> Path:
    """Path of the detector's file: the given one, $ARCFACE_DETECTOR, or the one in the cache folder.

    Raises:
        DependencyMissing: OpenCV or the file is missing; the message says what to put where.
    """
    with importing("finding faces"):
        import cv2  # noqa: F401
    path = Path(model or os.environ.get("ARCFACE_DETECTOR") or CACHE / MODEL_NAME).expanduser()
    if not path.is_file():
        raise DependencyMissing(
            f"no face detector at {path}: expected YuNet's {MODEL_NAME}. Download it from {SOURCE} and put it there, "
            "or give its path with --detector or ARCFACE_DETECTOR"
        )
    return path


def detect_crops(files: Iterable[str], detector: FaceDetector) -> Iterator[Crop]:
    """Every face of every image as a crop named `path[0]`, `path[1]` …, best first; one image in memory at a time.

    An image that cannot be read, or has no face, yields one refused crop under its path.
    """
    for name in files:
        if name.lower().endswith(ARRAY_SUFFIXES):
            yield Crop(name, None, CROPS_NOT_PHOTOS)
            continue
        try:
            data = Path(name).read_bytes()
        except OSError as exc:
            yield Crop(name, None, exc.strerror or str(exc))
            continue
        yield from detect_in(name, data, detector)


def detect_in(name: str, data: bytes, detector: FaceDetector) -> Iterator[Crop]:
    """Like `detect_crops`, of one image's bytes."""
    try:
        faces = detector.detect_encoded(data)
        if not faces:
            raise InvalidFaces(f"no face found (score of at least {detector.min_score:g})")
    except InvalidFaces as exc:
        yield Crop(name, None, str(exc))
        return
    for index, found in enumerate(faces):
        yield Crop(f"{name}[{index}]", found.face, found=Found(found.score, found.box, found.landmarks))


def load_detected(sources: Iterable[str | Path], detector: FaceDetector) -> tuple[FaceArray, list[str], list[Crop]]:
    """All faces of all images at once: uint8 (N,112,112,3) BGR, their N names, and what was refused."""
    return gather(detect_crops(find_files(sources), detector))
