"""AsyncPhotoEmbedder: the asyncio twin of PhotoEmbedder, with the same session and messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing

from arcface_clients.closing import AsyncClosing
from arcface_clients.errors import InvalidFaces
from arcface_clients.photos.client import PhotoClient
from arcface_clients.photos.face import Face, Verified
from arcface_clients.photos.session import PhotoLike, encoded, refused
from arcface_clients.triton.aio import AsyncLive, each, in_turn_async
from arcface_clients.triton.client import STREAM_RETRY_FOR_S
from arcface_clients.triton.options import check_retry
from arcface_clients.triton.sansio import Steps, T, arun


class AsyncPhotoEmbedder(PhotoClient, AsyncClosing):
    """Faces of photos from a Triton server for asyncio; belongs to the event loop that first uses it.

    Arguments and errors are those of `PhotoEmbedder`. A cancelled task cancels its requests. Files are read, and pixels
    compressed, on a thread.
    """

    def _set_up(self) -> None:
        super()._set_up()
        self._live = AsyncLive(self.options.connection())

    async def faces(self, photo: PhotoLike) -> list[Face]:
        """The faces of a photo, best score first; see `PhotoEmbedder.faces`."""
        return await self._run(self._session.faces(await _encoded(photo), self.options.retry_for_s))

    async def faces_stream(
        self, photos: Iterable[PhotoLike] | AsyncIterable[PhotoLike], *, retry_for_s: float = STREAM_RETRY_FOR_S
    ) -> AsyncGenerator[list[Face] | InvalidFaces, None]:
        """What `faces` gives for each photo, in order, `in_flight` at a time; see `PhotoEmbedder.faces_stream`."""
        check_retry(retry_for_s)
        begun = self._begun(photos, retry_for_s)
        async with aclosing(begun), aclosing(in_turn_async(begun, self.options.in_flight)) as answers:
            async for answer in answers:
                yield answer

    async def verify(self, a: PhotoLike, b: PhotoLike, *, max_distance: float | None = None) -> Verified | None:
        """The most alike pair of faces of two photos; see `PhotoEmbedder.verify`."""
        return await self._run(self._session.verify(await _encoded(a), await _encoded(b), max_distance))

    async def ensure_ready(self) -> None:
        """Ask the server for the model now; see `PhotoEmbedder.ensure_ready`."""
        await self._run(self._session.ready())

    async def pin_detector(self) -> str | None:
        """Refuse the faces of any other detector than now; see `PhotoEmbedder.pin_detector`."""
        return await self._run(self._session.pin_detector())

    async def close(self) -> None:
        """Give up the connection; may be called twice. Requests under way fail."""
        transport = self._live.end()
        if transport:
            await transport.close()

    async def _begun(
        self, photos: Iterable[PhotoLike] | AsyncIterable[PhotoLike], retry_for_s: float
    ) -> AsyncGenerator[asyncio.Task[list[Face] | InvalidFaces], None]:
        async for photo in each(photos):
            yield asyncio.create_task(self._or_refused(photo, retry_for_s))

    async def _or_refused(self, photo: PhotoLike, retry_for_s: float) -> list[Face] | InvalidFaces:
        try:
            return await self._run(self._session.faces(await _encoded(photo), retry_for_s))
        except (InvalidFaces, OSError) as exc:
            return refused(exc)

    async def _run(self, steps: Steps[T]) -> T:
        session = self._session
        return await arun(session.in_time(steps, session.deadline_s()), self._live.transport())


async def _encoded(photo: PhotoLike) -> bytes:
    return photo if isinstance(photo, bytes) else await asyncio.to_thread(encoded, photo)
