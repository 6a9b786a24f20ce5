"""AsyncTritonEmbedder: the asyncio twin of TritonEmbedder, with the same session, streams and messages."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.errors import ClientUnusable
from arcface_clients.faces.check import Faces, check_in_place
from arcface_clients.triton.address import Tls
from arcface_clients.triton.embedder import IN_FLIGHT, STREAM_RETRY_FOR_S, stream_size
from arcface_clients.triton.options import Options
from arcface_clients.triton.route import SharedMemory, Way
from arcface_clients.triton.sansio import arun
from arcface_clients.triton.served import ServedModel
from arcface_clients.triton.session import Job
from arcface_clients.triton.streaming import Stream
from arcface_clients.triton.transports import open_async_transport


class AsyncTritonEmbedder:
    """Embeddings from a Triton server for asyncio; belongs to the event loop that first uses it.

    Arguments and errors are those of `TritonEmbedder`. A cancelled task cancels its requests.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str = "arcface",
        *,
        timeout_s: float = 120.0,
        in_flight: int = IN_FLIGHT,
        retry_for_s: float = 5.0,
        expected_contract: str | None = None,
        headers: Mapping[str, str] | None = None,
        tls: Tls | None = None,
        compression: str | None = None,
        shared_memory: SharedMemory = "auto",
    ) -> None:
        """Check the arguments; nothing is sent yet."""
        self._options = Options(
            url,
            model,
            timeout_s,
            in_flight,
            retry_for_s,
            expected_contract,
            headers,
            tls,
            compression,
            shared_memory,
        )
        self._session = self._options.session()
        self.address = self._session.address
        self.model = model
        self.in_flight = in_flight
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None  # process and loop
        self._transport: Any = None
        self._closed = False

    async def encode(self, faces: Array | Sequence[Array]) -> Array:
        """Unit embeddings float32 (N,D) in order; see `TritonEmbedder.encode`.

        The event loop stands still while the producer of faces on a GPU finishes, and while they are copied.
        """
        faces = check_in_place(faces)
        size = (await self._served()).max_batch_size
        rows = np.empty((len(faces), self._session.embedding_dim), np.float32)
        done = 0
        chunks = _each([faces[i : i + size]] for i in range(0, len(faces), size))
        async with aclosing(self._in_order(chunks, None)) as answers:
            async for answer in answers:
                rows[done : done + len(answer)] = answer
                done += len(answer)
        return rows

    async def encode_stream(
        self,
        items: Iterable[Array] | AsyncIterable[Array],
        *,
        batch_size: int | None = None,
        retry_for_s: float = STREAM_RETRY_FOR_S,
    ) -> AsyncIterator[Array]:
        """Embeddings of a stream, one for each item and in order; see `TritonEmbedder.encode_stream`."""
        served = await self._served()
        stream = Stream(stream_size(served, batch_size), self._session.embedding_dim)
        async with aclosing(self._in_order(_chunks(items, stream), retry_for_s)) as answers:
            async for rows in answers:
                for item in stream.give(rows):
                    yield item
        for item in stream.finished():
            yield item

    @property
    def served(self) -> ServedModel | None:
        """What the server says of the model; None before the first `ensure_ready` or `encode`."""
        return self._session.served

    @property
    def embedding_dim(self) -> int:
        """D, the width of an embedding; 0 before the first use."""
        return self._session.embedding_dim

    @property
    def contract_id(self) -> str | None:
        """The served embedding contract; None before the first use, or without the import's overlay."""
        return self._session.served.contract_id if self._session.served else None

    @property
    def way(self) -> Way:
        """Shared memory or the wire, and why."""
        return self._session.way

    @property
    def gpu_way(self) -> Way | None:
        """The same for faces on a GPU; None before the first ones came."""
        return self._session.gpu_way

    async def ensure_ready(self) -> ServedModel:
        """Ask the server for the model now, and check its contract; see `TritonEmbedder.ensure_ready`."""
        return await arun(self._session.connect(), self._opened())

    async def close(self) -> None:
        """Give up the connection and the shared memory; may be called twice. Requests under way fail."""
        self._closed = True
        transport, self._transport = self._transport, None
        if transport:
            await arun(self._session.detach(), transport)
            await transport.close()

    async def _served(self) -> ServedModel:
        return self._session.served or await self.ensure_ready()

    async def _in_order(self, chunks: AsyncIterable[list[Faces]], retry_for_s: float | None) -> AsyncIterator[Array]:
        """Embeddings of each chunk in order, `in_flight` requests under way."""
        window: deque[tuple[asyncio.Task[Array], Job]] = deque()
        try:
            async for chunk in chunks:
                if self._session.undecided(chunk):
                    await arun(self._session.choose_gpu_way(chunk[0].device), self._opened())
                job = self._session.prepare(chunk, self._opened().pack)
                window.append((asyncio.create_task(self._embed(job, retry_for_s)), job))
                while window and (len(window) == self.in_flight or window[0][0].done()):
                    rows = await window[0][0]
                    window.popleft()
                    yield rows
            while window:
                rows = await window[0][0]
                window.popleft()
                yield rows
        finally:
            for task, _ in window:
                task.cancel()
            await asyncio.gather(*(task for task, _ in window), return_exceptions=True)
            for _, job in window:
                self._session.drop(job)

    async def _embed(self, job: Job, retry_for_s: float | None) -> Array:
        return await arun(self._session.embed(job, retry_for_s), self._opened())

    def _opened(self) -> Any:
        here = (os.getpid(), asyncio.get_running_loop())
        if self._owner is None:
            self._owner = here
        if self._owner != here:
            raise ClientUnusable(
                f"this client belongs to another {'event loop' if self._owner[0] == here[0] else 'process'}: "
                "make one client in each"
            )
        if self._closed:
            raise ClientUnusable("this client is closed; make a new one.")
        if self._transport is None:
            self._transport = open_async_transport(self._options.connection())
        return self._transport

    async def __aenter__(self) -> AsyncTritonEmbedder:
        """The embedder itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()

    def __repr__(self) -> str:
        """URL and model."""
        return f"{type(self).__name__}({str(self.address)!r}, model={self.model!r})"


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    """Items of either kind of iterable."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _chunks(items: Iterable[Array] | AsyncIterable[Array], stream: Stream) -> AsyncIterator[list]:
    """The requests that a stream's items fill."""
    async for item in _each(items):
        for chunk in stream.take(item):
            yield chunk
    for chunk in stream.rest():
        yield chunk
