"""Aligns a face to the ArcFace template from five landmarks."""

from __future__ import annotations

import numpy as np

from arcface_clients.arrays import Array, FaceArray
from arcface_clients.contract import FACE_SIZE
from arcface_clients.errors import InvalidFaces

# Eyes, nose and mouth corners in the 112×112 crop, each pair from left to right (x, y in pixels).
# Source: InsightFace, insightface/utils/face_align.py, arcface_dst.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity_to_template(landmarks: Array) -> Array:
    """The rotation, scale and shift, float64 (2,3), that map landmarks (5,2) as close as possible to `TEMPLATE`.

    Least squares over a·z + b with points as complex numbers z = x + iy; in the plane this equals Umeyama (1991)
    without reflection, which is InsightFace's `estimate_norm`.

    Raises:
        InvalidFaces: not (5,2) finite numbers, or all points coincide.
    """
    points = np.asarray(landmarks, np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise InvalidFaces(f"expected five landmarks (5, 2) in pixels, got {points.shape} or NaN.")
    source, target = points @ (1, 1j), TEMPLATE @ (1, 1j)
    spread = source - source.mean()
    size = (np.abs(spread) ** 2).sum()
    if size < 1e-9:
        raise InvalidFaces("the five landmarks coincide: expected eyes, nose and mouth corners.")
    a = (spread.conj() * (target - target.mean())).sum() / size
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align_face(image_bgr: Array, landmarks: Array) -> FaceArray:
    """Warp a face uint8 (112,112,3) BGR out of an image uint8 (H,W,3) BGR: InsightFace's `norm_crop`, black outside."""
    import cv2

    size, black = (FACE_SIZE, FACE_SIZE), (0.0, 0.0, 0.0)
    return np.asarray(cv2.warpAffine(image_bgr, similarity_to_template(landmarks), size, borderValue=black), np.uint8)
