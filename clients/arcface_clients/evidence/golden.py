"""Golden rows: the reference's embeddings of a few synthetic faces, which travel with the weights.

They are in the import's manifest and in the served config. So whoever loads a model, or reaches a server, can compare
it with InsightFace, without InsightFace and without a file: a gate that was passed on one CPU says little about a
runtime that computes the same file wrongly on another. They are kept as float16, which moves a unit row of 512 numbers
by a drift of 1e-7 at most: a hundredth of the limit for fp32.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping

import numpy as np

from arcface_clients.arrays import Array, FaceArray, FloatArray
from arcface_clients.evidence.gate import GateVerdict, judge_embeddings
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


def judge_golden(
    record: str | None, embed: Callable[[FaceArray], Array], precision: str, limits: Mapping[str, float]
) -> GateVerdict | None:
    """Embed the faces and judge them beside the record's rows; None, and nothing is embedded, if it has none.

    Args:
        record: what `golden_record` made at the import.
        embed: uint8 (2,112,112,3) BGR → float32 (2,D).
        precision: of what embeds.
        limits: largest 1 − cosine by precision (configuration: comparison.max_drift).
    """
    expected = golden_rows(record)
    return None if expected is None else judge_embeddings(expected, embed(golden_faces()), precision, limits)


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
