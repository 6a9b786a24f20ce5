"""FaceAnalysis: InsightFace's entry point, answered by a Triton server instead of this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.closing import Closing
from arcface_clients.photos.embedder import PhotoEmbedder
from arcface_clients.photos.face import Face
from arcface_clients.photos.session import PhotoLike


class AnalysedFace(SimpleNamespace):
    """A face with InsightFace's field names, also read as `face["bbox"]`.

    Attributes:
        bbox: float32 (4,): x1, y1, x2, y2.
        kps: float32 (5,2): eye, eye, nose, mouth corners, from left to right.
        det_score: 0..1.
        embedding: float32 (D,), as the network gives it.
        normed_embedding: float32 (D,) of unit length.
        embedding_norm: length of `embedding`.
    """

    def __getitem__(self, name: str) -> Any:
        """A field by its name."""
        return getattr(self, name)


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
        self._photos.close()
        self._photos = PhotoEmbedder(self._url, **{**self._options, "min_score": det_thresh})

    def get(self, img: PhotoLike, max_num: int = 0) -> list[AnalysedFace]:
        """The faces of an image uint8 (H,W,3) BGR (or a path, or a file's bytes), best score first.

        `max_num` keeps the largest and most central ones as in InsightFace; of a file, the largest.

        Raises:
            What `PhotoEmbedder.faces` raises.
        """
        faces = [_analysed(face) for face in self._photos.faces(img)]
        if max_num and len(faces) > max_num:
            centre = np.array(img.shape[1::-1]) / 2 if isinstance(img, np.ndarray) else None
            faces = sorted(faces, key=lambda face: -_weight(face.bbox, centre))[:max_num]
        return faces

    def close(self) -> None:
        """Give up the connection."""
        self._photos.close()


def _analysed(face: Face) -> AnalysedFace:
    x, y, width, height = face.box
    return AnalysedFace(
        bbox=np.array([x, y, x + width, y + height], np.float32),
        kps=face.landmarks,
        det_score=face.score,
        embedding=face.embedding * np.float32(face.norm),
        normed_embedding=face.embedding,
        embedding_norm=face.norm,
    )


def _weight(box: Array, centre: Array | None) -> float:
    """Area less twice the squared distance to the centre (insightface/model_zoo/scrfd.py, metric "default")."""
    area = float((box[2] - box[0]) * (box[3] - box[1]))
    return area if centre is None else area - 2 * float((((box[:2] + box[2:]) / 2 - centre) ** 2).sum())
