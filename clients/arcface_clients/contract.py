"""The tensor contract: aligned faces in, unit embeddings out, and the id that says which embeddings may be compared.

Input  `face`       uint8   [N, 112, 112, 3]  BGR, aligned to the ArcFace template
Output `embedding`  float32 [N, D]            unit L2 norm; D follows the model (128, 256 and 512 occur)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arcface_clients.errors import InvalidFaces

FACE_INPUT = "face"
EMBEDDING_OUTPUT = "embedding"
FACE_SIZE = 112
FACE_SHAPE = (FACE_SIZE, FACE_SIZE, 3)
FACE_BYTES = FACE_SIZE * FACE_SIZE * 3  # 37,632 on the wire


@dataclass(frozen=True)
class Preprocessing:
    """What the network wants: channel order, and (x − mean) / std per channel *in that order*, x in 0..255.

    InsightFace's own models: rgb, mean = std = 127.5. Models that normalise inside their graph: mean 0, std 1.
    """

    color: str = "rgb"
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)

    def __post_init__(self) -> None:
        """Refuse what no network can mean; single numbers have to be spread by the caller."""
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

    def apply(self, faces_bgr_u8: np.ndarray) -> np.ndarray:
        """Network input from faces: uint8 (N,112,112,3) BGR → float32 (N,3,112,112), network order and range."""
        ordered = faces_bgr_u8[..., ::-1] if self.color == "rgb" else faces_bgr_u8
        blob = (ordered.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(blob.transpose(0, 3, 1, 2))


def contract_id(source_sha256: str, preprocessing: Preprocessing, dim: int) -> str:
    """Sha256 over (source ONNX digest, preprocessing, dimension); embeddings may be compared only where it is equal."""
    parts = {"source_sha256": source_sha256, "preprocessing": preprocessing.to_json(), "dim": int(dim)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_faces(faces: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Faces as the server wants them: uint8 (N,112,112,3), C-contiguous; one face (112,112,3) becomes N = 1.

    Floats are taken when they are whole numbers in 0..255 (some loaders give those); N = 0 is fine. An array on a GPU
    (uint8, C-contiguous) is copied to the host.

    Raises:
        InvalidFaces: wrong shape or dtype, values that are not whole numbers in 0..255, NaN.
    """
    if not isinstance(faces, np.ndarray):
        faces = _on_host(faces)
    try:
        array = np.asarray(faces)
    except ValueError as exc:  # a list of crops of different sizes
        raise InvalidFaces(
            f"the faces have different shapes: expected crops of {FACE_SHAPE} each ({exc}). "
            "Align and resize first: arcface embed --detect does it for photos"
        ) from exc
    if array.size == 0 and array.ndim <= 1:
        return np.empty((0, *FACE_SHAPE), np.uint8)
    if array.shape == FACE_SHAPE:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != FACE_SHAPE:
        hint = ""
        if array.ndim == 4 and array.shape[1] == 3:
            hint = " This looks like NCHW: pass faces.transpose(0, 2, 3, 1), BGR, before any normalisation."
        raise InvalidFaces(f"expected faces of shape (N, 112, 112, 3) BGR, got {array.shape}.{hint}")
    if array.dtype != np.uint8:
        array = _whole_numbers(array)
    return np.ascontiguousarray(array)


def _on_host(faces: Any) -> Any:
    """Faces on a GPU copied from there; anything else as it is."""
    from arcface_clients.gpu_faces import check_in_place, is_on_gpu

    if is_on_gpu(faces):
        faces = check_in_place(faces)
        return faces if isinstance(faces, np.ndarray) else faces.to_host()
    if isinstance(faces, (list, tuple)) and len(faces) and is_on_gpu(faces[0]):
        raise InvalidFaces("got a list of arrays on a GPU: expected one array, such as torch.stack(faces).")
    return faces


def _whole_numbers(array: np.ndarray) -> np.ndarray:
    """uint8 from numbers that already are whole and within 0..255; everything else is refused, never rounded."""
    if array.dtype.kind not in "fiu":
        raise InvalidFaces(f"expected faces of dtype uint8 (0..255), got {array.dtype}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise InvalidFaces(f"face {bad} holds NaN or infinity: expected pixel values 0..255.")
    if array.size == 0:
        return array.astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 255:
        hint = " They look normalised already: pass the raw BGR crop, the server normalises." if low >= -4 else ""
        raise InvalidFaces(f"expected pixel values 0..255, got {low:g}..{high:g}.{hint}")
    if array.dtype.kind == "f" and (array != np.floor(array)).any():
        hint = " They look scaled to 0..1: multiply by 255 and round." if high <= 1 else " Round to uint8 yourself."
        raise InvalidFaces(f"expected whole pixel values 0..255, got fractions (range {low:g}..{high:g}).{hint}")
    return array.astype(np.uint8)
