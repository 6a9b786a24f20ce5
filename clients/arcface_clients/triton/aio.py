"""AsyncTritonEmbedder: the asyncio twin of TritonEmbedder, with the same session, streams and messages."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing
from functools import partial
from math import inf
from typing import TypeVar

from arcface_clients.arrays import FloatArray
from arcface_clients.closing import AsyncClosing
from arcface_clients.errors import ClientUnusable
from arcface_clients.faces.check import Faces, FacesLike, check_in_place
from arcface_clients.triton.address import Connection
from arcface_clients.triton.answer import Answer, Rows
from arcface_clients.triton.client import STREAM_RETRY_FOR_S, TritonClient
from arcface_clients.triton.options import check_retry
from arcface_clients.triton.sansio import arun
from arcface_clients.triton.served import ServedModel
from arcface_clients.triton.session import InferRequest
from arcface_clients.triton.streaming import Stream
from arcface_clients.triton.transports import AsyncTransport, open_async_transport
from arcface_clients.triton.transports.refusals import closed

T = TypeVar("T")


class AsyncTritonEmbedder(TritonClient, AsyncClosing):
    """Embeddings from a Triton server for asyncio; belongs to the event loop that first uses it.

    Arguments and errors are those of `TritonEmbedder`. A cancelled task cancels its requests. What is known of the
    served model (`served`, `embedding_dim`, `contract_id`, `max_batch_size`) is there after the first `ensure_ready`
    or `encode`.
    """

    def _set_up(self) -> None:
        super()._set_up()
        self._live = AsyncLive(self.options.connection())

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
        check_retry(retry_for_s)
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
        return self._session.tell(await arun(self._session.connect(), self._live.transport()))

    async def close(self) -> None:
        """Give up the connection and the shared memory; may be called twice. Requests under way fail."""
        transport = self._live.end()
        if transport:
            await arun(self._session.regions.detach(), transport)
            await transport.close()

    async def _known(self, deadline_s: float = inf) -> ServedModel:
        session = self._session
        known = session.served
        return known if known else await arun(session.in_time(session.connect(), deadline_s), self._live.transport())

    async def _encode(self, faces: FacesLike, norms: bool) -> Answer:
        checked, deadline_s = check_in_place(faces), self._session.deadline_s()
        size = (await self._known(deadline_s)).max_batch_size
        chunks: AsyncIterator[list[Faces]] = each([checked[i : i + size]] for i in range(0, len(checked), size))
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
        begun = self._begun(chunks, retry_for_s, norms, deadline_s)
        async with aclosing(begun), aclosing(in_turn_async(begun, self.options.in_flight)) as answers:
            async for answer in answers:
                yield answer

    async def _begun(
        self, chunks: AsyncIterable[list[Faces]], retry_for_s: float | None, norms: bool, deadline_s: float | None
    ) -> AsyncGenerator[asyncio.Task[Answer], None]:
        async for chunk in chunks:
            transport = self._live.transport()
            await arun(self._session.welcome(chunk), transport)
            request = self._session.prepare(chunk, transport.pack, norms)
            task = asyncio.create_task(self._embed(request, retry_for_s, deadline_s))
            task.add_done_callback(partial(self._forget, request))
            yield task

    def _forget(self, request: InferRequest, _: object) -> None:
        self._session.drop(request)  # also when it is cancelled before it ran

    async def _embed(self, request: InferRequest, retry_for_s: float | None, deadline_s: float | None) -> Answer:
        session = self._session
        deadline_s = session.deadline_s() if deadline_s is None else deadline_s
        return await arun(session.in_time(session.embed(request, retry_for_s), deadline_s), self._live.transport())


class AsyncLive:
    """The connection of an asyncio client, opened with its first use; it belongs to that process and event loop."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is opened yet."""
        self._connection = connection
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None  # process and loop
        self._transport: AsyncTransport | None = None
        self._ended = False

    def transport(self) -> AsyncTransport:
        """The connection.

        Raises:
            ClientUnusable: closed, or of another event loop or process.
        """
        here = (os.getpid(), asyncio.get_running_loop())
        if self._owner is None:
            self._owner = here
        if self._owner != here:
            raise ClientUnusable(
                f"this client belongs to another {'event loop' if self._owner[0] == here[0] else 'process'}: "
                "make one client in each"
            )
        if self._ended:
            raise closed()
        if self._transport is None:
            self._transport = open_async_transport(self._connection)
        return self._transport

    def end(self) -> AsyncTransport | None:
        """From now on nothing is sent; gives the connection, which is to be closed."""
        self._ended, transport, self._transport = True, self._transport, None
        return transport


async def in_turn_async(tasks: AsyncIterable[asyncio.Task[T]], in_flight: int) -> AsyncGenerator[T, None]:
    """Results in order of tasks that are begun as they are taken, `in_flight` at a time; the rest is cancelled."""
    window: deque[asyncio.Task[T]] = deque()
    try:
        async for task in tasks:
            window.append(task)
            while window and (len(window) == in_flight or window[0].done()):
                result = await window[0]
                window.popleft()
                yield result
        while window:
            result = await window[0]
            window.popleft()
            yield result
    finally:
        for task in window:
            task.cancel()
        await asyncio.gather(*window, return_exceptions=True)


async def each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    """Items of either kind of iterable."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _chunks(items: Iterable[FacesLike] | AsyncIterable[FacesLike], stream: Stream) -> AsyncIterator[list[Faces]]:
    """The requests that a stream's items fill."""
    async for item in each(items):
        for chunk in stream.take(item):
            yield chunk
    for chunk in stream.rest():
        yield chunk
