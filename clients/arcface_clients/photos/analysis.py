"""FaceAnalysis: InsightFace's entry point, answered by a Triton server instead of this process."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.closing import Closing
from arcface_clients.errors import WrongUse
from arcface_clients.photos.embedder import PhotoEmbedder
from arcface_clients.photos.face import Face
from arcface_clients.photos.session import PhotoLike


class AnalysedFace(dict[str, Any]):
    """A face as InsightFace's `Face`: a dict whose keys are attributes too; an attribute that nobody set is None.

    Attributes:
        bbox: float32 (4,): x1, y1, x2, y2.
        kps: float32 (5,2): eye, eye, nose, mouth corners, from left to right.
        det_score: float32, 0..1.
        embedding: float32 (D,), as the network gives it.
    """

    @property
    def embedding_norm(self) -> Any:
        """Length of `embedding` as it is now, float32; None without one."""
        return None if self.embedding is None else np.linalg.norm(self.embedding)

    @property
    def normed_embedding(self) -> Any:
        """`embedding` as it is now, float32 (D,) of unit length; None without one."""
        return None if self.embedding is None else self.embedding / self.embedding_norm

    def __getattr__(self, name: str) -> Any:
        """A key, None where there is none, such as `age`."""
        if name.startswith("__"):  # what copy and pickle ask for
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a key; what is computed from `embedding` cannot be set."""
        if isinstance(getattr(type(self), name, None), property):
            raise AttributeError(f"{name} follows from embedding: set that")
        self[name] = value

    def __missing__(self, name: str) -> Any:
        """What is computed, by its name too.

        Raises:
            KeyError: there is no such field.
        """
        if isinstance(getattr(type(self), name, None), property):
            return getattr(self, name)
        raise KeyError(name)


class FaceAnalysis(Closing):
    """`app.get(img)` as in InsightFace, with the models on a server.

    Args:
        url: see `ClientOptions`.
        options: further arguments of `PhotoEmbedder`.
    """

    def __init__(self, url: str = "localhost:8001", **options: Any) -> None:
        """Nothing is sent yet."""
        self._url, self._options = url, options
        self._photos = PhotoEmbedder(url, **options)

    def prepare(self, ctx_id: int = 0, det_thresh: float = 0.5, det_size: Any = None) -> None:
        """Take over the threshold; the device and the detector's size are the server's business."""
        before, self._photos = self._photos, PhotoEmbedder(self._url, **{**self._options, "min_score": det_thresh})
        before.close()

    def get(self, img: PhotoLike, max_num: int = 0, det_metric: str = "default") -> list[AnalysedFace]:
        """The faces of an image uint8 (H,W,3) BGR (or a path, or a file's bytes), best score first.

        `max_num`, above 0, keeps the largest and most central ones as in InsightFace; of a file, or with `det_metric`
        "max", the largest.

        Raises:
            WrongUse: max_num is no whole number.
            What else `PhotoEmbedder.faces` raises.
        """
        if not isinstance(max_num, Integral):
            raise WrongUse(f"max_num is {max_num!r}: expected a whole number, 0 for all faces.")
        faces = [_analysed(face) for face in self._photos.faces(img)]
        if 0 < max_num < len(faces):
            pixels = img if isinstance(img, np.ndarray) and det_metric != "max" else None
            centre = None if pixels is None else np.array(pixels.shape[1::-1]) // 2
            faces = sorted(faces, key=lambda face: -_weight(face.bbox, centre))[:max_num]
        return faces

    def close(self) -> None:
        """Give up the connection."""
        self._photos.close()


def _analysed(face: Face) -> AnalysedFace:
    x, y, width, height = face.box
    return AnalysedFace(
        bbox=np.array([x, y, x + width, y + height], np.float32),
        kps=face.landmarks.copy(),  # callers scale it in place
        det_score=np.float32(face.score),
        embedding=face.embedding * np.float32(face.norm),
    )


def _weight(box: Array, centre: Array | None) -> float:
    """Area less twice the squared distance to the centre (insightface/model_zoo/scrfd.py, metric "default")."""
    area = float((box[2] - box[0]) * (box[3] - box[1]))
    return area if centre is None else area - 2 * float((((box[:2] + box[2:]) / 2 - centre) ** 2).sum())
