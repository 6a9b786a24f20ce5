"""Finds the faces of a photo: boxes, scores and five landmarks each.

The seam for other detectors is `Look`: an image in, rows out. Everything else here is the same for all of them.
"""

from __future__ import annotations

from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]

MAX_SIDE = 1280  # larger photos are shrunk to this for detection; faces are cropped from the photo itself
MIN_SCORE = 0.7
MIN_SIZE = 16
# A small detector's landmarks shift by several pixels with the size of the face. Looking again at each face, resized to
# LOOK_SIDE, and then at its mirror image makes alignment more stable.
LOOK_SIDE = 128
LOOK_MARGIN = 1.5
REACH = 32_000  # pixels: cv2.warpAffine takes no larger side than 32,766 (imgwarp.cpp, SHRT_MAX)


class Look(Protocol):
    """A detector.

    Attributes:
        looks: how often a face should be looked at; see `find_faces`.
    """

    looks: int

    def __call__(self, image_bgr: Image, min_score: float) -> Rows:
        """The faces in an image uint8 (H,W,3) BGR with at least this score.

        Returns:
            float32 (F,15): x, y, width, height, five landmarks (eyes, nose, mouth corners, from left to right), score;
            in pixels of the image.
        """
        ...


def detector_id(
    kind: str,
    sha256: str,
    looks: int,
    *,
    min_score: float = MIN_SCORE,
    min_size: float = MIN_SIZE,
    max_faces: int = 0,
    max_side: int = MAX_SIDE,
    look_side: int = LOOK_SIDE,
) -> str:
    """What decides which faces are found in a photo and how they are aligned, in one line, for two runs to compare.

    The runtime is not in it: all of them find the same.

    Args:
        kind: yunet or scrfd, which says how the file is run.
        sha256: of the detector's ONNX.
        looks: as in `find_faces`, like the rest.
    """
    return (
        f"{kind} sha256={sha256} min_score={min_score:g} min_size={min_size:g} max_faces={max_faces} "
        f"max_side={max_side} looks={looks} look_side={look_side}"
    )


def find_faces(
    look: Look,
    image_bgr: Image,
    scale: float = 1,
    *,
    min_score: float = MIN_SCORE,
    min_size: float = MIN_SIZE,
    max_faces: int = 0,
    max_side: int = MAX_SIDE,
    looks: int | None = None,
    look_side: int = LOOK_SIDE,
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
        looks: how often a face is looked at: 1, in the photo; 2, again by itself; 3, and at its mirror image. None: as
            often as suits the detector.
        look_side: pixels of a face's picture for the second and third look.
    """
    shrink = min(1.0, max_side / max(image_bgr.shape[:2]))
    if min(image_bgr.shape[:2]) * shrink < 1:  # a line: nothing is left of it
        return np.empty((0, 15), np.float32)
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
    looks = look.looks if looks is None else looks
    for row in best_first if looks > 1 else ():
        patch, zoom, corner = _patch(image_bgr, scale, small, small_scale, row[:4].astype(np.float64), look_side)
        points = _look_again(look, patch, zoom, corner, row[4:14].reshape(5, 2), min_score, looks > 2)
        row[4:14] = points.reshape(10)
    # Landmarks in one point are no face, and cannot be aligned.
    spread = np.ptp(best_first[:, 4:14].reshape(-1, 5, 2), axis=1).max(axis=1)
    faces: Rows = best_first[spread > 1e-3]
    return faces


def _patch(
    image: Image, scale: float, small: Image, small_scale: float, box: npt.NDArray[np.float64], side: int
) -> tuple[Image, float, npt.NDArray[np.float64]]:
    """A face and its surroundings as uint8 (side,side,3), its zoom, and its corner in the photo."""
    reach = LOOK_MARGIN * float(max(box[2:]))
    zoom = side / reach  # pixels of the patch for one of the photo
    corner = box[:2] + box[2:] / 2 - reach / 2
    source, source_scale = (small, small_scale) if zoom < small_scale else (image, scale)
    # warpAffine does not average: a large face is warped to a multiple of the side, then shrunk with averaging.
    times = max(1, int(source_scale / zoom))
    part, part_corner = _around(source, (box[:2] + box[2:] / 2) * source_scale)
    ratio = times * zoom / source_scale
    shift = times * zoom * (0.5 / source_scale - 0.5 - corner) + (times - 1) / 2 + ratio * np.array(part_corner)
    matrix = np.array([[ratio, 0, shift[0]], [0, ratio, shift[1]]])
    patch = cv2.warpAffine(part, matrix, (times * side, times * side))
    return np.asarray(cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA), np.uint8), zoom, corner


def _around(image: Image, centre: npt.NDArray[np.float64]) -> tuple[Image, list[int]]:
    """The part of an image around a point (x, y) that warpAffine takes (most images: all), and its corner."""
    height, width = image.shape[:2]
    x, y = (int(min(max(0, c - REACH / 2), max(0, n - REACH))) for c, n in zip(centre, (width, height), strict=True))
    return image[y : y + REACH, x : x + REACH], [x, y]


def _look_again(
    look: Look,
    patch: Image,
    zoom: float,
    corner: npt.NDArray[np.float64],
    landmarks: Rows,
    min_score: float,
    mirror: bool,
) -> npt.NDArray[Any]:
    """Mean of the landmarks (5,2) found on a face's patch and its mirror image; `landmarks` if it is not found."""
    side, found = len(patch), []
    for mirrored in (False, True)[: 1 + mirror]:
        rows = look(np.asarray(cv2.flip(patch, 1), np.uint8) if mirrored else patch, min_score)
        points = rows[:, 4:14].reshape(-1, 5, 2)
        if mirrored:
            points = np.stack([side - 1 - points[..., 0], points[..., 1]], axis=-1)[:, [1, 0, 2, 4, 3]]
        points = points / zoom + corner
        off = np.linalg.norm(points.mean(axis=1) - landmarks.mean(axis=0), axis=1)
        if len(off) and off.min() < 0.25 * side / zoom:
            found.append(points[off.argmin()])
    return np.mean(found, axis=0) if found else landmarks
