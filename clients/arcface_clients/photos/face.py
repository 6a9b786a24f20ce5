"""What a server says of a photo: its faces, and how alike two photos are."""

from __future__ import annotations

from dataclasses import dataclass, field

from arcface_clients.arrays import FaceArray, FloatArray


@dataclass(frozen=True)
class Face:
    """One face of a photo; coordinates are in pixels of the upright photo."""

    box: tuple[float, float, float, float]  # x, y, width, height
    score: float  # 0..1
    landmarks: FloatArray = field(repr=False)  # (5,2): eye, eye, nose, mouth corners, from left to right
    embedding: FloatArray = field(repr=False)  # (D,) of unit length
    norm: float  # length before that; a short one is the mark of a poor picture
    crop: FaceArray | None = field(default=None, repr=False)  # uint8 (112,112,3) BGR, aligned; only if asked for


@dataclass(frozen=True)
class Verified:
    """The most alike pair of faces of two photos."""

    similarity: float  # cosine
    same: bool  # whether the distance, 1 − similarity, is at most the limit
    box_a: tuple[float, float, float, float]  # x, y, width, height, in the first photo
    box_b: tuple[float, float, float, float]
    max_distance: float  # the limit
    calibrated: bool  # whether it was measured with the weights that are served; False for a limit of the caller's
