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
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity_to_template(landmarks: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The rotation, scale and shift, float64 (2,3), that map landmarks (5,2) as close as possible to `TEMPLATE`.

    Least squares over a·z + b with points as complex numbers z = x + iy; in the plane this equals Umeyama (1991)
    without reflection, which is InsightFace's `estimate_norm`.

    Raises:
        ValueError: not (5,2) finite numbers, or all points coincide.
    """
    points = np.asarray(landmarks, np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f"expected five landmarks (5, 2) in pixels, got {points.shape} or NaN.")
    source, target = points @ (1, 1j), TEMPLATE @ (1, 1j)
    spread = source - source.mean()
    size = (np.abs(spread) ** 2).sum()
    if size < 1e-9:
        raise ValueError("the five landmarks coincide: expected eyes, nose and mouth corners.")
    a = (spread.conj() * (target - target.mean())).sum() / size
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


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
    size, black = (FACE_SIZE, FACE_SIZE), (0.0, 0.0, 0.0)
    return np.asarray(cv2.warpAffine(image_bgr, matrix, size, borderValue=black), np.uint8)
