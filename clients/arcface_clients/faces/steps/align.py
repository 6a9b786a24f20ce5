"""Warps a face to the ArcFace template by its five landmarks."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

FACE_SIZE = 112
# Eyes, nose and mouth corners in the 112×112 crop, each pair from left to right (x, y in pixels).
# Source: InsightFace, insightface/utils/face_align.py, arcface_dst.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
REACH = 32_000  # pixels: cv2.warpAffine takes no larger side than 32,766 (imgwarp.cpp, SHRT_MAX)
_CENTRE = TEMPLATE.mean(axis=0)
_SPREAD = TEMPLATE - _CENTRE


def similarity_to_template(landmarks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The rotation, scale and shift, float64 (2,3), that map landmarks (5,2) as close as possible to `TEMPLATE`.

    Least squares without reflection: Umeyama (1991), equations 38 to 43. Landmarks in float32 are taken in float32, as
    InsightFace's `estimate_norm` does: a shift of 1e-5 pixels changes a few pixels of the crop by one.

    Raises:
        ValueError: not (5,2) finite numbers, or all points coincide.
    """
    points = np.asarray(landmarks)
    points = points if points.dtype == np.float32 else points.astype(np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f"expected five landmarks (5, 2) in pixels, got {points.shape} or NaN.")
    centre = points.mean(axis=0)
    spread = points - centre
    variance = spread.var(axis=0).sum()
    if variance < 1e-9:
        raise ValueError("the five landmarks coincide: expected eyes, nose and mouth corners.")
    left, stretch, right = np.linalg.svd(_SPREAD.T @ spread / len(points))
    signs = np.array([1.0, -1.0 if _determinant(left) * _determinant(right) < 0 else 1.0])
    rotation = left @ np.diag(signs) @ right
    scale = 1.0 / variance * (stretch @ signs)
    return np.column_stack([scale * rotation, _CENTRE - scale * (rotation @ centre)])


def _determinant(turn: npt.NDArray[Any]) -> float:
    return float(turn[0, 0] * turn[1, 1] - turn[0, 1] * turn[1, 0])


def magnification(landmarks: npt.NDArray[Any]) -> float:
    """Pixels of the crop for one of the photo; below 1 the crop shows less than the photo."""
    return float(np.hypot(*similarity_to_template(landmarks)[:, 0]))


def align_face(
    image_bgr: npt.NDArray[np.uint8], landmarks: npt.NDArray[Any], scale: float = 1
) -> npt.NDArray[np.uint8]:
    """Warp a face uint8 (112,112,3) BGR out of an image uint8 (H,W,3) BGR: InsightFace's `norm_crop`, black outside.

    Args:
        image_bgr: the photo, or a reduced copy whose pixel v shows the photo at (v + 0.5) / scale − 0.5.
        landmarks: (5,2), in pixels of the photo.
        scale: of the copy.

    Raises:
        ValueError: see `similarity_to_template`.
    """
    matrix = similarity_to_template(landmarks)
    matrix[:, 2] += matrix[:, :2].sum(axis=1) * (0.5 / scale - 0.5)
    matrix[:, :2] /= scale
    part, corner = _around(image_bgr, np.mean(landmarks, axis=0) * scale)
    matrix[:, 2] += matrix[:, :2] @ corner
    size, black = (FACE_SIZE, FACE_SIZE), (0.0, 0.0, 0.0)
    return np.asarray(cv2.warpAffine(part, matrix, size, borderValue=black), np.uint8)


def _around(image: npt.NDArray[np.uint8], centre: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """The part of an image around a point (x, y) that warpAffine takes (most images: all), and its corner."""
    height, width = image.shape[:2]
    x, y = (int(min(max(0, c - REACH / 2), max(0, n - REACH))) for c, n in zip(centre, (width, height), strict=True))
    return image[y : y + REACH, x : x + REACH], [x, y]
