"""Golden rows: the reference's embeddings of a few synthetic faces, which travel with the weights in the served config.

So whoever reaches a server can compare it with InsightFace, without InsightFace and without a file. They are kept as
float16, which moves a unit row of 512 numbers by a drift of 1e-7 at most: a hundredth of the limit for fp32.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np

from arcface_clients.arrays import Array, FaceArray, FloatArray
from arcface_clients.faces.synthetic import synthetic_faces

COUNT = 2
_SEED = 112
_MADE_OF = "faces-1"  # change it when `synthetic_faces` gives others; a pixel that is rounded otherwise is no matter


def golden_faces() -> FaceArray:
    """The faces: uint8 (2,112,112,3) BGR, the same on every host."""
    return synthetic_faces(COUNT, seed=_SEED)


def golden_record(rows: Array) -> str:
    """The rows as text for a manifest and for config.pbtxt; `rows` float (2,D), of any length."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return f"{_MADE_OF}:{base64.b64encode(unit.astype('<f2').tobytes()).decode()}"


def is_golden(record: str | None) -> bool:
    """Whether a record is one of the faces that `golden_faces` gives now."""
    return golden_rows(record) is not None


def golden_rows(record: str | None) -> FloatArray | None:
    """The rows float32 (2,D) of a record; None if it is none, or was made of other faces."""
    made_of, _, text = (record or "").partition(":")
    if made_of != _MADE_OF:
        return None
    try:
        rows = np.frombuffer(base64.b64decode(text, validate=True), "<f2").reshape(COUNT, -1)
    except (binascii.Error, ValueError):
        return None
    return rows.astype(np.float32) if rows.size and np.isfinite(rows).all() and rows.any(axis=1).all() else None
