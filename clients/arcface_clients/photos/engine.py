"""PhotoEngine: a TritonEmbedder whose server finds the faces of photos too, for bulk jobs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from arcface_clients.errors import InvalidFaces
from arcface_clients.photos.embedder import PhotoEmbedder
from arcface_clients.photos.face import Face
from arcface_clients.photos.session import PhotoLike
from arcface_clients.triton.client import STREAM_RETRY_FOR_S
from arcface_clients.triton.embedder import TritonEmbedder
from arcface_clients.triton.transports.refusals import closed


class PhotoEngine(TritonEmbedder):
    """Faces of one contract that one detector finds, those of its first use.

    The arguments are those of `TritonEmbedder`.
    """

    def _set_up(self) -> None:
        super()._set_up()
        self._lock = threading.Lock()
        self._photos: PhotoEmbedder | None = None
        self._detector_id: str | None = None
        self._closed = False

    @property
    def detector_id(self) -> str | None:
        """Which detector finds the faces, and how; None where the server does not say.

        Raises:
            What `PhotoEmbedder.pin_detector` raises.
        """
        self._embedder()
        return self._detector_id

    @property
    def contract_prefix(self) -> str | None:
        """As of `TritonEmbedder`; where photos were sent, what their faces name."""
        return (self._photos.contract_prefix if self._photos else None) or super().contract_prefix

    def faces_stream(
        self, photos: Iterable[PhotoLike], *, retry_for_s: float = STREAM_RETRY_FOR_S
    ) -> Iterator[list[Face] | InvalidFaces]:
        """As `PhotoEmbedder.faces_stream`, with crops, and of the contract that `contract_id` names."""
        return self._embedder().faces_stream(photos, retry_for_s=retry_for_s)

    def _embedder(self) -> PhotoEmbedder:
        with self._lock:
            if self._closed:
                raise closed()
            if self._photos is None:
                told = {**vars(self.options), "model": "photo_faces", "expected_contract": self.contract_id}
                photos = PhotoEmbedder(**told, crops=True)
                try:
                    self._detector_id = photos.pin_detector()
                except BaseException:
                    photos.close()
                    raise
                self._photos = photos
            return self._photos

    def close(self) -> None:
        """Give up both connections; may be called twice."""
        with self._lock:
            self._closed = True
            photos, self._photos = self._photos, None
        if photos is not None:
            photos.close()
        super().close()
