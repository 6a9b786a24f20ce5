"""PhotoEngine: a TritonEmbedder whose server finds the faces of photos too, for bulk jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from arcface_clients.errors import InvalidFaces
from arcface_clients.photos.embedder import PhotoEmbedder
from arcface_clients.photos.face import Face
from arcface_clients.photos.session import PhotoLike
from arcface_clients.triton.client import STREAM_RETRY_FOR_S
from arcface_clients.triton.embedder import TritonEmbedder


class PhotoEngine(TritonEmbedder):
    """The arguments are those of `TritonEmbedder`.

    Attributes:
        photos: the same server's client of photos, which gives the crops too.
    """

    def _set_up(self) -> None:
        super()._set_up()
        self.photos = PhotoEmbedder(**{**vars(self.options), "model": "photo_faces"}, crops=True)

    def faces_stream(
        self, photos: Iterable[PhotoLike], *, retry_for_s: float = STREAM_RETRY_FOR_S
    ) -> Iterator[list[Face] | InvalidFaces]:
        """As `PhotoEmbedder.faces_stream`."""
        return self.photos.faces_stream(photos, retry_for_s=retry_for_s)

    def close(self) -> None:
        """Give up both connections; may be called twice."""
        self.photos.close()
        super().close()
