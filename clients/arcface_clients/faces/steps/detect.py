"""Finds the faces of a photo: boxes, scores and five landmarks each.

The seam for other detectors is `Look`: an image in, rows out. Everything else here is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]
Look = Callable[[Image, float], Rows]
"""An image uint8 (H,W,3) BGR and the lowest score in; float32 (F,15) out: x, y, width, height, five landmarks (eyes,
nose, mouth corners, from left to right), score; in pixels of the image."""

MAX_SIDE = 1280  # larger photos are shrunk to this for detection; faces are cropped from the photo itself
MIN_SCORE = 0.7
MIN_SIZE = 16
# YuNet's landmarks shift by several pixels with the size of the face. Detecting again on each face, resized to
# REFINE_SIDE, and on its mirror image makes alignment more stable.
REFINE_SIDE = 320
REFINE_MARGIN = 1.5


class YuNet:
    """OpenCV's detector; for one thread."""

    def __init__(self, file: str) -> None:
        """Load it, and try it on nothing.

        Raises:
            cv2.error: not a file that OpenCV can run as YuNet.
        """
        self._network = cv2.FaceDetectorYN.create(file, "", (320, 320), MIN_SCORE)
        self._network.detect(np.zeros((320, 320, 3), np.uint8))

    def __call__(self, image_bgr: Image, min_score: float) -> Rows:
        """See `Look`."""
        self._network.setInputSize((image_bgr.shape[1], image_bgr.shape[0]))
        self._network.setScoreThreshold(min_score)
        rows = self._network.detect(image_bgr)[1]
        if rows is None:
            return np.empty((0, 15), np.float32)
        return np.asarray(rows[np.isfinite(rows).all(axis=1)], np.float32)


def find_faces(
    look: Look,
    image_bgr: Image,
    scale: float = 1,
    *,
    min_score: float = MIN_SCORE,
    min_size: float = MIN_SIZE,
    max_faces: int = 0,
    max_side: int = MAX_SIDE,
    refine: bool = True,
) -> Rows:
    """The faces of a photo, float32 (F,15) as of `Look` in pixels of the photo, best score first.

    Args:
        look: the detector.
        image_bgr: the photo, or a reduced copy whose pixel v shows the photo at (v + 0.5) / scale − 0.5.
        scale: of the copy.
        min_score: lowest score of a face, 0..1.
        min_size: smallest side of a face, in pixels of the photo.
        max_faces: so many of the best; 0: all.
        max_side: larger images are shrunk to this for detection.
        refine: look again at each face for better landmarks.
    """
    shrink = min(1.0, max_side / max(image_bgr.shape[:2]))
    small, small_scale = image_bgr, scale
    if shrink < 1:
        small = np.asarray(cv2.resize(image_bgr, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA), np.uint8)
        small_scale = scale * shrink
    rows: Rows = look(small, min_score).copy()
    shift = 0.5 / small_scale - 0.5
    rows[:, :14] /= small_scale
    rows[:, [0, 1, *range(4, 14)]] += shift
    rows = rows[rows[:, 2:4].min(axis=1) >= min_size]
    best_first: Rows = rows[np.lexsort((rows[:, 1], rows[:, 0], -rows[:, 14]))]
    if max_faces:
        best_first = best_first[:max_faces]
    if refine:
        for row in best_first:
            row[4:14] = _look_again(look, image_bgr, scale, small, small_scale, row, min_score).reshape(10)
    return best_first


def _look_again(
    look: Look, image: Image, scale: float, small: Image, small_scale: float, row: Rows, min_score: float
) -> npt.NDArray[Any]:
    """Mean of the landmarks (5,2) found on the cropped face and its mirror image; those of `row` if it is not found."""
    box, landmarks = row[:4].astype(np.float64), row[4:14].reshape(5, 2)
    side = REFINE_MARGIN * float(max(box[2:]))
    zoom = REFINE_SIDE / side  # pixels of the patch for one of the photo
    corner = box[:2] + box[2:] / 2 - side / 2
    # warpAffine does not average, so a large face is taken from the copy that was shrunk with averaging.
    source, source_scale = (small, small_scale) if zoom < small_scale else (image, scale)
    shift = zoom * (0.5 / source_scale - 0.5 - corner)
    matrix = np.array([[zoom / source_scale, 0, shift[0]], [0, zoom / source_scale, shift[1]]])
    patch = np.asarray(cv2.warpAffine(source, matrix, (REFINE_SIDE, REFINE_SIDE)), np.uint8)
    found = []
    for mirrored in (False, True):
        rows = look(np.ascontiguousarray(patch[:, ::-1]) if mirrored else patch, min_score)
        points = rows[:, 4:14].reshape(-1, 5, 2)
        if mirrored:
            points = np.stack([REFINE_SIDE - 1 - points[..., 0], points[..., 1]], axis=-1)[:, [1, 0, 2, 4, 3]]
        points = points / zoom + corner
        off = np.linalg.norm(points.mean(axis=1) - landmarks.mean(axis=0), axis=1)
        if len(off) and off.min() < 0.25 * side:
            found.append(points[off.argmin()])
    return np.mean(found, axis=0) if found else landmarks
