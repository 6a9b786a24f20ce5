"""Detects and aligns the faces in images with YuNet, through OpenCV."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arcface_clients.arrays import Array, FaceArray
from arcface_clients.errors import ConfigError, DependencyMissing, InvalidFaces
from arcface_clients.extras import how_to_mend
from arcface_clients.faces.align import align_face
from arcface_clients.faces.images import ARRAY_SUFFIXES, Crop, Found, find_files, gather
from arcface_clients.faces.photos import read_photo

if TYPE_CHECKING:
    import cv2

MODEL_NAME = "face_detection_yunet_2023mar.onnx"
CACHE = Path("~/.cache/arcface-triton/detectors")
SOURCE = "https://github.com/opencv/opencv_zoo/tree/main/models/face_detection_yunet"

# YuNet's landmarks shift by several pixels with the size of the face. Detecting again on each face, resized to
# REFINE_SIDE, and on its mirror image makes alignment more stable: `scripts/consensus-demo --images` measures how much
# verification gains.
REFINE_SIDE = 320
REFINE_MARGIN = 1.5


@dataclass(frozen=True)
class DetectedFace:
    """One face of an image; coordinates are in pixels of the upright image."""

    face: Array = field(repr=False)  # uint8 (112,112,3) BGR, aligned
    score: float  # 0..1
    box: tuple[float, float, float, float]  # x, y, width, height
    landmarks: Array = field(repr=False)  # float32 (5,2): eye, eye, nose, mouth corners, from left to right


class FaceDetector:
    """YuNet; can be used from several threads, each with its own network."""

    def __init__(
        self,
        model: Path | str | None = None,
        min_score: float = 0.7,
        min_size: int = 16,
        max_side: int = 1280,
        refine: bool = True,
    ) -> None:
        """Find and load the model.

        Args:
            model: YuNet's ONNX; None: $ARCFACE_DETECTOR, else ~/.cache/arcface-triton/detectors/.
            min_score: lowest YuNet score of a face, 0..1.
            min_size: smallest side of a face, in pixels of the image.
            max_side: larger images are shrunk to this for detection; faces are cropped from the full image.
            refine: run detection twice more on each face for better landmarks.

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
        self.min_score, self.min_size, self.max_side, self.refine = min_score, min_size, max_side, refine
        self._of_thread = threading.local()
        self._network()

    def detect(self, image_bgr: Array) -> list[DetectedFace]:
        """The faces in an image uint8 (H,W,3) BGR, best score first; an empty list if there are none.

        Raises:
            InvalidFaces: not such an image.
        """
        import cv2

        if image_bgr.ndim != 3 or image_bgr.shape[2] != 3 or image_bgr.dtype != np.uint8 or not image_bgr.size:
            raise InvalidFaces(f"expected an image uint8 (H, W, 3) BGR, got {image_bgr.dtype} {image_bgr.shape}.")
        shrink = min(1.0, self.max_side / max(image_bgr.shape[:2]))
        small = image_bgr
        if shrink < 1:
            small = cv2.resize(image_bgr, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        faces: list[DetectedFace] = []
        for row in self._rows(small):
            box = row[:4] / shrink
            if min(box[2:]) < self.min_size:
                continue
            landmarks = row[4:14].reshape(5, 2) / shrink
            if self.refine:
                landmarks = self._look_again(image_bgr, small, shrink, box, landmarks)
            x, y, width, height = box.tolist()
            faces.append(
                DetectedFace(align_face(image_bgr, landmarks), float(row[14]), (x, y, width, height), landmarks)
            )
        return sorted(faces, key=lambda face: (-face.score, face.box))

    def _look_again(self, image: Array, small: Array, shrink: float, box: Array, landmarks: Array) -> Array:
        """Mean of the landmarks found on the cropped face and its mirror image; `landmarks` if it is not found again.

        `small` is the image at `shrink`; box and landmarks are in pixels of the image.
        """
        import cv2

        side = REFINE_MARGIN * float(max(box[2:]))
        scale = REFINE_SIDE / side
        corner = box[:2] + box[2:] / 2 - side / 2
        # warpAffine does not average, so a large face is taken from the copy that was shrunk with averaging.
        source, zoom = (small, scale / shrink) if scale < shrink else (image, scale)
        matrix = np.array([[zoom, 0, -scale * corner[0]], [0, zoom, -scale * corner[1]]])
        patch = cv2.warpAffine(source, matrix, (REFINE_SIDE, REFINE_SIDE))
        found = []
        for mirrored in (False, True):
            rows = self._rows(np.ascontiguousarray(patch[:, ::-1]) if mirrored else patch)
            points = rows[:, 4:14].reshape(-1, 5, 2)
            if mirrored:
                points = np.stack([REFINE_SIDE - 1 - points[..., 0], points[..., 1]], axis=-1)[:, [1, 0, 2, 4, 3]]
            points = points / scale + corner
            off = np.linalg.norm(points.mean(axis=1) - landmarks.mean(axis=0), axis=1)
            if len(off) and off.min() < 0.25 * side:
                found.append(points[off.argmin()])
        return np.asarray(np.mean(found, axis=0), np.float32) if found else landmarks

    def _rows(self, image: Array) -> Array:
        """YuNet's rows float32 (F,15): box, five landmarks, score."""
        network = self._network()
        network.setInputSize((image.shape[1], image.shape[0]))
        rows = network.detect(image)[1]
        if rows is None:
            return np.empty((0, 15), np.float32)
        finite: Array = rows[np.isfinite(rows).all(axis=1)]
        return finite

    def _network(self) -> cv2.FaceDetectorYN:
        import cv2

        if not hasattr(self._of_thread, "network"):
            try:
                network = cv2.FaceDetectorYN.create(str(self.model), "", (320, 320), self.min_score)
                network.detect(np.zeros((320, 320, 3), np.uint8))
            except cv2.error as exc:
                raise ConfigError(
                    f"{self.model} is not a detector that OpenCV can run ({exc.err or exc}): "
                    f"expected {MODEL_NAME} from {SOURCE}"
                ) from exc
            self._of_thread.network = network
        kept: cv2.FaceDetectorYN = self._of_thread.network
        return kept


def find_detector(model: Path | str | None = None) -> Path:
    """Path of the detector's file: the given one, $ARCFACE_DETECTOR, or the one in the cache folder.

    Raises:
        DependencyMissing: OpenCV or the file is missing; the message says what to put where.
    """
    try:
        import cv2  # noqa: F401
    except ImportError as exc:
        raise DependencyMissing(f"finding faces needs OpenCV ({exc}). Next: {how_to_mend(exc)}") from exc
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
        try:
            if name.lower().endswith(ARRAY_SUFFIXES):
                raise InvalidFaces("an array of crops, not an image: embed it without --detect")
            faces = detector.detect(read_photo(name))
            if not faces:
                raise InvalidFaces(f"no face found (score of at least {detector.min_score:g})")
        except (InvalidFaces, OSError) as exc:
            yield Crop(name, None, exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc))
            continue
        for index, found in enumerate(faces):
            yield Crop(f"{name}[{index}]", found.face, found=Found(found.score, found.box, found.landmarks))


def load_detected(sources: Iterable[str | Path], detector: FaceDetector) -> tuple[FaceArray, list[str], list[Crop]]:
    """All faces of all images at once: uint8 (N,112,112,3) BGR, their N names, and what was refused."""
    return gather(detect_crops(find_files(sources), detector))
