"""SCRFD, the detector of InsightFace's packs, as `Look` of detect.py; it needs a session of ONNX Runtime.

Guo et al. 2021, "Sample and Computation Redistribution for Efficient Face Detection". The image is scaled and padded to
640×640 as InsightFace does by default.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

SIDE = 640
MEAN, STD = 127.5, 128.0  # of the input, RGB
MAX_OVERLAP = 0.4  # intersection over union of two boxes of which one is dropped
_LAYOUTS = {9: ((8, 16, 32), 2), 15: ((8, 16, 32, 64, 128), 1)}  # outputs -> strides, anchors a place


class Scrfd:
    """One detector; several threads may call it.

    Attributes:
        looks: its landmarks are steady enough to be taken from the photo.
    """

    looks = 1

    def __init__(self, session: Any) -> None:
        """Check that the session's network is one with landmarks.

        Raises:
            ValueError: it is not.
        """
        (image,), outputs = session.get_inputs(), session.get_outputs()
        if len(outputs) not in _LAYOUTS or len(image.shape) != 4:
            raise ValueError(f"expected SCRFD with 9 or 15 outputs (scores, boxes, landmarks), got {len(outputs)}")
        fixed = [size for size in image.shape[2:] if isinstance(size, int) and size > 0]
        if fixed not in ([], [SIDE, SIDE]):
            raise ValueError(f"expected an input of {SIDE}×{SIDE} pixels or of any size, got {image.shape}")
        self._session, self._input = session, image.name
        self._strides, self._anchors = _LAYOUTS[len(outputs)]

    def __call__(self, image_bgr: npt.NDArray[np.uint8], min_score: float) -> npt.NDArray[np.float32]:
        """See `Look`."""
        height, width = image_bgr.shape[:2]
        size = (int(SIDE * width / height), SIDE) if height > width else (SIDE, int(SIDE * height / width))
        if not min(size):
            return np.empty((0, 15), np.float32)
        padded = np.zeros((SIDE, SIDE, 3), np.uint8)
        padded[: size[1], : size[0]] = cv2.resize(image_bgr, size)
        blob = cv2.dnn.blobFromImage(padded, 1 / STD, (SIDE, SIDE), (MEAN, MEAN, MEAN), swapRB=True)
        rows = self._rows(self._session.run(None, {self._input: blob}), min_score)
        rows[:, :14] *= height / size[1]
        return _without_overlaps(rows)

    def _rows(self, outputs: list[npt.NDArray[Any]], min_score: float) -> npt.NDArray[np.float32]:
        """All places with at least this score, float32 (P,15), best first."""
        levels = len(self._strides)
        found = [np.empty((0, 15), np.float32)]
        for level, stride in enumerate(self._strides):
            score, reach, points = (outputs[level + kind * levels].reshape(-1, n) for kind, n in enumerate((1, 4, 10)))
            good = np.flatnonzero(score[:, 0] >= min_score)
            place = good // self._anchors  # row by row
            across = SIDE // stride
            centre = stride * np.stack([place % across, place // across], axis=1).astype(np.float32)
            left_top, right_bottom = centre - stride * reach[good, :2], centre + stride * reach[good, 2:]
            landmarks = np.tile(centre, 5) + stride * points[good]
            found.append(np.hstack([left_top, right_bottom - left_top, landmarks, score[good]]).astype(np.float32))
        rows = np.concatenate(found)
        best_first: npt.NDArray[np.float32] = rows[np.argsort(-rows[:, 14], kind="stable")]
        return best_first


def _without_overlaps(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Greedy suppression: a box that overlaps a better one is dropped; pixels are counted as InsightFace does."""
    left_top, right_bottom = rows[:, :2], rows[:, :2] + rows[:, 2:4]
    area = np.prod(rows[:, 2:4] + 1, axis=1)
    left, kept = np.arange(len(rows)), []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(best)
        corner = np.maximum(left_top[best], left_top[left])
        common = np.prod(np.maximum(0, np.minimum(right_bottom[best], right_bottom[left]) - corner + 1), axis=1)
        left = left[common / (area[best] + area[left] - common) <= MAX_OVERLAP]
    chosen: npt.NDArray[np.float32] = rows[kept]
    return chosen
