"""AsyncTritonEmbedder: the asyncio twin of TritonEmbedder, with the same session, streams and messages."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from arcface_clients.arrays import FloatArray
from arcface_clients.errors import ClientUnusable
from arcface_clients.faces.check import Faces, FacesLike, check_in_place
from arcface_clients.triton.answer import Answer, Rows
from arcface_clients.triton.client import STREAM_RETRY_FOR_S, TritonClient
from arcface_clients.triton.sansio import arun
from arcface_clients.triton.served import ServedModel
from arcface_clients.triton.session import InferRequest
from arcface_clients.triton.streaming import Stream
from arcface_clients.triton.transports import AsyncTransport, open_async_transport
from arcface_clients.triton.transports.refusals import closed

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class AsyncTritonEmbedder(TritonClient):
    """Embeddings from a Triton server for asyncio; belongs to the event loop that first uses it.

    Arguments and errors are those of `TritonEmbedder`. A cancelled task cancels its requests. What is known of the
    served model (`served`, `embedding_dim`, `contract_id`, `max_batch_size`) is there after the first `ensure_ready`
    or `encode`.
    """

    def _set_up(self) -> None:
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None  # process and loop
        self._transport: AsyncTransport | None = None
        self._closed = False

    async def encode(self, faces: FacesLike) -> FloatArray:
        """Unit embeddings float32 (N,D) in order; see `TritonEmbedder.encode`.

        The event loop stands still while the producer of faces on a GPU finishes, and while they are copied.
        """
        return (await self._encode(faces, norms=False)).embeddings

    async def encode_with_norms(self, faces: FacesLike) -> tuple[FloatArray, FloatArray]:
        """Embeddings, and their lengths before they were cut; see `TritonEmbedder.encode_with_norms`."""
        answer = await self._encode(faces, norms=True)
        return answer.embeddings, answer.norms

    async def encode_stream(
        self,
        items: Iterable[FacesLike] | AsyncIterable[FacesLike],
        *,
        batch_size: int | None = None,
        retry_for_s: float = STREAM_RETRY_FOR_S,
        normalized: bool = True,
    ) -> AsyncGenerator[FloatArray, None]:
        """Embeddings of a stream, one for each item and in order; see `TritonEmbedder.encode_stream`."""
        served = await self._known()
        stream = Stream(self._stream_size(served, batch_size), self._session.embedding_dim)
        async with aclosing(self._in_order(_chunks(items, stream), retry_for_s, not normalized)) as answers:
            async for answer in answers:
                for item in stream.give(answer.embeddings if normalized else answer.features):
                    yield item
        for item in stream.finished():
            yield item

    @property
    def served(self) -> ServedModel:
        """What the server says of the model.

        Raises:
            ClientUnusable: nobody has asked the server yet, and a property cannot wait for it.
        """
        if self._session.served is None:
            raise ClientUnusable("this client has not asked the server yet: await ensure_ready() first.")
        return self._session.tell(self._session.served)

    async def ensure_ready(self) -> ServedModel:
        """Ask the server for the model now, and check its contract; see `TritonEmbedder.ensure_ready`."""
        return self._session.tell(await arun(self._session.connect(), self._opened()))

    async def close(self) -> None:
        """Give up the connection and the shared memory; may be called twice. Requests under way fail."""
        self._closed = True
        transport, self._transport = self._transport, None
        if transport:
            await arun(self._session.regions.detach(), transport)
            await transport.close()

    async def _known(self, deadline_s: float = inf) -> ServedModel:
        session = self._session
        known = session.served
        return known if known else await arun(session.in_time(session.connect(), deadline_s), self._opened())

    async def _encode(self, faces: FacesLike, norms: bool) -> Answer:
        checked, deadline_s = check_in_place(faces), self._session.deadline_s()
        size = (await self._known(deadline_s)).max_batch_size
        chunks: AsyncIterator[list[Faces]] = _each([checked[i : i + size]] for i in range(0, len(checked), size))
        rows = Rows(len(checked), self._session.embedding_dim, norms)
        async with aclosing(self._in_order(chunks, None, norms, deadline_s)) as answers:
            async for answer in answers:
                rows.add(answer)
        return rows.whole

    async def _in_order(
        self,
        chunks: AsyncIterable[list[Faces]],
        retry_for_s: float | None,
        norms: bool = False,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[Answer, None]:
        """The answer to each chunk in order, `in_flight` requests under way."""
        window: deque[tuple[asyncio.Task[Answer], InferRequest]] = deque()
        try:
            async for chunk in chunks:
                transport = self._opened()
                await arun(self._session.welcome(chunk), transport)
                request = self._session.prepare(chunk, transport.pack, norms)
                window.append((asyncio.create_task(self._embed(request, retry_for_s, deadline_s)), request))
                while window and (len(window) == self.options.in_flight or window[0][0].done()):
                    answer = await window[0][0]
                    window.popleft()
                    yield answer
            while window:
                answer = await window[0][0]
                window.popleft()
                yield answer
        finally:
            for task, _ in window:
                task.cancel()
            await asyncio.gather(*(task for task, _ in window), return_exceptions=True)
            for _, request in window:
                self._session.drop(request)

    async def _embed(self, request: InferRequest, retry_for_s: float | None, deadline_s: float | None) -> Answer:
        session = self._session
        deadline_s = session.deadline_s() if deadline_s is None else deadline_s
        return await arun(session.in_time(session.embed(request, retry_for_s), deadline_s), self._opened())

    def _opened(self) -> AsyncTransport:
        here = (os.getpid(), asyncio.get_running_loop())
        if self._owner is None:
            self._owner = here
        if self._owner != here:
            raise ClientUnusable(
                f"this client belongs to another {'event loop' if self._owner[0] == here[0] else 'process'}: "
                "make one client in each"
            )
        if self._closed:
            raise closed()
        if self._transport is None:
            self._transport = open_async_transport(self.options.connection())
        return self._transport

    async def __aenter__(self) -> Self:
        """The embedder itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    """Items of either kind of iterable."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _chunks(items: Iterable[FacesLike] | AsyncIterable[FacesLike], stream: Stream) -> AsyncIterator[list[Faces]]:
    """The requests that a stream's items fill."""
    async for item in _each(items):
        for chunk in stream.take(item):
            yield chunk
    for chunk in stream.rest():
        yield chunk
