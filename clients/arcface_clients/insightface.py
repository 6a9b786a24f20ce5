"""InsightFace's recognition model with a Triton server behind it: code written for FaceAnalysis keeps running."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from arcface_clients.arrays import Array, FaceArray, FloatArray
from arcface_clients.closing import Closing
from arcface_clients.contract import FACE_SIZE
from arcface_clients.errors import ConfigError, InvalidFaces
from arcface_clients.faces.photos import read_photo
from arcface_clients.photos.analysis import FaceAnalysis
from arcface_clients.triton.embedder import TritonEmbedder

__all__ = ["FaceAnalysis", "Recognition", "analyse_many"]


class Recognition(Closing):
    """Takes the place of InsightFace's `ArcFaceONNX`: `app.models["recognition"] = Recognition("localhost:8001")`.

    Embeddings have the length that the network gave them, as InsightFace's have; `face.normed_embedding` is what
    `TritonEmbedder` returns.

    Attributes:
        taskname, input_size, input_shape, input_mean, input_std: as InsightFace states them. Mean and std say how
            `forward` reads a blob; the served model normalises pixels itself.
        embedder: the client, for its contract id and options.
    """

    taskname = "recognition"
    input_size = (FACE_SIZE, FACE_SIZE)
    input_shape = (None, 3, FACE_SIZE, FACE_SIZE)
    input_mean = 127.5
    input_std = 127.5

    def __init__(self, server: str | TritonEmbedder = "localhost:8001") -> None:
        """Nothing is sent yet.

        Args:
            server: a URL, or a client with options of its own (TLS, headers, deadlines).
        """
        self.embedder = TritonEmbedder(server) if isinstance(server, str) else server

    @property
    def output_shape(self) -> tuple[int, int]:
        """(1, D); connects."""
        return (1, self.embedder.embedding_dim)

    def prepare(self, ctx_id: int = 0, **_: object) -> None:
        """Connect now, so that a server that is away is noticed here. Where it computes is the server's choice.

        Raises:
            BackendUnavailable: it cannot answer.
        """
        self.embedder.ensure_ready()

    def get(self, img: Array, face: Any) -> FloatArray:
        """Align one face, embed it and set `face.embedding`; see `analyse_many` for more than one.

        Args:
            img: uint8 (H,W,3) BGR.
            face: InsightFace's `Face`, or anything with `kps` (5,2) in pixels of the image.

        Returns:
            Float32 (D,), not normalised.

        Raises:
            InvalidFaces: no such image, or no landmarks.
            What `TritonEmbedder.encode` raises.
        """
        face.embedding = self.get_feat(_aligned(img, face)).reshape(-1)
        embedding: FloatArray = face.embedding
        return embedding

    def get_feat(self, imgs: Array | list[Array]) -> FloatArray:
        """Embeddings float32 (N,D), not normalised, of one crop uint8 (H,W,3) BGR or a list; any N, split and in order.

        As in InsightFace, a crop of another size than 112×112 is resized.

        Raises:
            What `TritonEmbedder.encode` raises.
        """
        crops = imgs if isinstance(imgs, list) else [imgs]
        embeddings, norms = self.embedder.encode_with_norms([_resized(crop) for crop in crops])
        return embeddings * norms[:, None]

    def forward(self, batch_data: Array) -> FloatArray:
        """Embeddings float32 (N,D), not normalised, of a blob (N,3,112,112) RGB with values 0..255."""
        return self.get_feat(list(np.asarray(batch_data).transpose(0, 2, 3, 1)[..., ::-1]))

    def compute_sim(self, feat1: Array, feat2: Array) -> float:
        """Cosine of two embeddings of any length."""
        a, b = np.ravel(feat1), np.ravel(feat2)
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    def close(self) -> None:
        """Give up the connection."""
        self.embedder.close()


def analyse_many(app: Any, photos: Iterable[Array | str | Path], **options: Any) -> Iterator[list[Any]]:
    """What `app.get` finds in each photo, in order; faces of many photos share a request, so the batches are full.

    Detection and the other models run here, photo by photo, while the server embeds the faces before. At most the
    requests under way are held in memory.

    Args:
        app: InsightFace's `FaceAnalysis`, prepared, with a `Recognition` as its `models["recognition"]`.
        photos: images uint8 (H,W,3) BGR, or paths of photos (read upright).
        options: for `app.get`, such as `max_num`.

    Raises:
        ConfigError: `app` has another recognition model.
        InvalidFaces: a photo cannot be read; the message names it.
        What `TritonEmbedder.encode_stream` raises.
    """
    recognition = app.models.get(Recognition.taskname)
    if not isinstance(recognition, Recognition):
        raise ConfigError(
            f"app.models['recognition'] is {type(recognition).__name__}; expected arcface_clients.insightface."
            "Recognition. Next: app.models['recognition'] = Recognition('localhost:8001')"
        )
    collector = _Collector()
    detecting = copy.copy(app)  # its own loop, with faces collected instead of embedded; `app` stays as it is
    detecting.models = {**app.models, Recognition.taskname: collector}
    found: deque[tuple[list[Any], int]] = deque()  # each photo's faces, and how many of them wait for an embedding

    def crops() -> Iterator[FaceArray]:
        for index, photo in enumerate(photos):
            faces = detecting.get(_image(photo, index), **options)
            batch = collector.taken()
            found.append((faces, len(batch)))
            if batch:
                yield np.stack(batch)

    waiting = collector.waiting
    for rows in chain(recognition.embedder.encode_stream(crops(), normalized=False), [None]):
        while rows is None or found[0][1] == 0:  # photos without a face, before these or at the end
            if not found:
                return
            yield found.popleft()[0]
        for row in rows:
            waiting.popleft().embedding = row.copy()
        yield found.popleft()[0]


class _Collector:
    """Stands in for the recognition model: aligns each face and leaves its embedding for later."""

    taskname = Recognition.taskname

    def __init__(self) -> None:
        self.waiting: deque[Any] = deque()  # faces, in the order of their crops
        self._crops: list[FaceArray] = []

    def get(self, img: Array, face: Any) -> None:
        self._crops.append(_aligned(img, face))
        self.waiting.append(face)

    def taken(self) -> list[FaceArray]:
        """The crops since the last call."""
        crops, self._crops = self._crops, []
        return crops


def _aligned(img: Array, face: Any) -> FaceArray:
    if getattr(face, "kps", None) is None:
        raise InvalidFaces("the face has no landmarks (kps): expected a detector that finds five, such as SCRFD.")
    from arcface_clients.faces.steps.align import align_face

    try:
        return align_face(img, face.kps)
    except ValueError as exc:
        raise InvalidFaces(str(exc)) from exc


def _resized(crop: Array) -> Array:
    crop = np.asarray(crop)
    if crop.ndim != 3 or crop.shape[:2] == Recognition.input_size or 0 in crop.shape:
        return crop
    import cv2

    return np.asarray(cv2.resize(crop, Recognition.input_size))


def _image(photo: Array | str | Path, index: int) -> Array:
    if isinstance(photo, (str, Path)):
        try:
            return read_photo(photo)
        except (InvalidFaces, OSError) as exc:
            raise InvalidFaces(f"{photo}: {exc}") from exc
    if not isinstance(photo, np.ndarray) or photo.ndim != 3 or photo.dtype != np.uint8:
        got = f"{photo.dtype} {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
        raise InvalidFaces(f"photo {index} is {got}: expected an image uint8 (H, W, 3) BGR. Could it not be read?")
    return photo
