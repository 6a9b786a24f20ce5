"""The tensor contract: aligned faces in, unit embeddings out, and an id that says which embeddings are comparable.

Input  `face`       uint8   [N, 112, 112, 3]  BGR, aligned to the ArcFace template
Output `embedding`  float32 [N, D]            unit L2 norm; D follows the model (128, 256 and 512 occur)
Output `norm`       float32 [N, 1]            length of the embedding before normalisation: a measure of quality
Output `contract`   int32   [N, 4]            the first 128 bits of the contract id, repeated in each row: every
                                              response identifies the weights that produced it

A request for `embedding` alone returns `embedding` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from arcface_clients.arrays import Array

FACE_INPUT = "face"
EMBEDDING_OUTPUT = "embedding"
NORM_OUTPUT = "norm"
CONTRACT_OUTPUT = "contract"
CONTRACT_DIGITS = 64
OUTPUTS = (EMBEDDING_OUTPUT, NORM_OUTPUT, CONTRACT_OUTPUT)
FACE_SIZE = 112
FACE_SHAPE = (FACE_SIZE, FACE_SIZE, 3)
UNIT_TOLERANCE = 1e-3  # on the squared norm: int8 and fp16 graphs normalise in float32 and stay well inside
FACE_BYTES = FACE_SIZE * FACE_SIZE * 3  # 37,632 on the wire


@dataclass(frozen=True)
class Preprocessing:
    """What the network expects: channel order, and (x − mean) / std per channel *in that order*, x in 0..255.

    InsightFace's own models: rgb, mean = std = 127.5. Models that normalise inside their graph: mean 0, std 1.
    """

    color: str = "rgb"
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)

    def __post_init__(self) -> None:
        """Reject values that make no sense; the caller expands single numbers to three."""
        if self.color not in ("rgb", "bgr"):
            raise ValueError(f"color is {self.color!r}; expected 'rgb' or 'bgr'")
        for name in ("mean", "std"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != 3 or not np.isfinite(values).all():
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected three finite numbers in 0..255 units")
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; expected three numbers above 0")

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the keys color, mean, std."""
        return {"color": self.color, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_json`."""
        return cls(color=data["color"], mean=tuple(data["mean"]), std=tuple(data["std"]))

    def apply(self, faces_bgr_u8: Array) -> Array:
        """Network input from faces: uint8 (N,112,112,3) BGR → float32 (N,3,112,112), network order and range."""
        ordered = faces_bgr_u8[..., ::-1] if self.color == "rgb" else faces_bgr_u8
        blob = (ordered.astype(np.float32) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(blob.transpose(0, 3, 1, 2))


def contract_id(source_sha256: str, preprocessing: Preprocessing, dim: int, output: str | None = None) -> str:
    """Sha256 over (source ONNX digest, preprocessing, dimension); only embeddings with equal ids may be compared.

    `output` is the chosen one of a source with several; it then counts as part of the source.
    """
    identity = source_sha256 if output is None else hashlib.sha256(f"{source_sha256} {output}".encode()).hexdigest()
    parts = {"source_sha256": identity, "preprocessing": preprocessing.to_json(), "dim": int(dim)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def contract_words(contract: str) -> npt.NDArray[np.int32]:
    """One row of the output `contract`: the first 128 bits of a contract id as int32 (4,), big-endian words.

    Raises:
        ValueError: not a contract id (64 hexadecimal digits).
    """
    if len(contract) != CONTRACT_DIGITS:
        raise ValueError(f"{contract!r} is not a contract id: expected {CONTRACT_DIGITS} hexadecimal digits")
    return np.frombuffer(bytes.fromhex(contract)[:16], ">i4").astype(np.int32)


def contract_prefix(row: npt.NDArray[np.int32]) -> str:
    """The inverse: the first 32 hexadecimal digits of the contract id, from a row int32 (4,) of `contract`."""
    return np.asarray(row, ">i4").tobytes().hex()


def named_by(engine: object) -> str | None:
    """What tells an engine's model from others, without asking it: its contract id, or what its answers named of that.

    None: it does not say, or was not asked yet.
    """
    named: str | None = getattr(engine, "contract_id", None) or getattr(engine, "contract_prefix", None)
    return named
