"""What the plain and the asyncio client of photos share: arguments and the session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arcface_clients.contract import contract_prefix
from arcface_clients.photos.session import PhotoSession
from arcface_clients.triton.client import ServerClient
from arcface_clients.triton.options import PhotoArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PhotoClient(ServerClient):
    """A client that sends photos to a server that has `photo_faces`.

    Args:
        url, model, arguments: as in `ClientOptions`.
        min_score: lowest detector score of a face, 0..1; None: the server's default.
        min_size: smallest side of a face, in pixels of the photo; None: the server's default.
        max_faces: so many of the best; None: the server's limit.
        crops: answer the aligned faces too.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str = "photo_faces",
        *,
        min_score: float | None = None,
        min_size: int | None = None,
        max_faces: int | None = None,
        crops: bool = False,
        **arguments: Unpack[PhotoArguments],
    ) -> None:
        """Check the arguments; nothing is sent yet."""
        self._wishes = {"min_score": min_score, "min_size": min_size, "max_faces": max_faces, "crops": crops}
        super().__init__(url, model, **arguments)

    def _set_up(self) -> None:
        told = dict(self._wishes)
        crops = bool(told.pop("crops"))
        self._session = PhotoSession(self.options, told, crops)

    @property
    def contract_prefix(self) -> str | None:
        """The first 32 digits of the contract id of the embeddings; None before the first face came."""
        row = self._session.contract
        return None if row is None else contract_prefix(row)

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | self._wishes
