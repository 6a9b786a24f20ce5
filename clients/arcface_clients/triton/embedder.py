"""TritonEmbedder: faces in, embeddings from a Triton server out."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from types import TracebackType
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.errors import ClientUnusable, ConfigError
from arcface_clients.faces.check import Faces, check_in_place
from arcface_clients.triton.address import Tls
from arcface_clients.triton.options import Options
from arcface_clients.triton.route import SharedMemory, Way
from arcface_clients.triton.sansio import run
from arcface_clients.triton.served import ServedModel
from arcface_clients.triton.session import Job, Session
from arcface_clients.triton.streaming import Stream
from arcface_clients.triton.transports import Transport, open_transport

IN_FLIGHT = 4
STREAM_RETRY_FOR_S = 120.0  # a server that is restarted loads its models again, which takes a while


class TritonEmbedder:
    """Embeddings from a Triton server; safe to use from many threads, connects with the first use.

    Args:
        url: `host:port` or `grpc://…`, `grpcs://…`, `http://…`, `https://…`.
        model: served model, normally the ensemble `arcface`.
        timeout_s: longest wait for the answer to one request of up to max_batch_size faces, queueing included.
        in_flight: requests under way at a time when there are more faces than fit one.
        retry_for_s: how long a lost server or an unloaded model is tried again; 0: not at all.
        expected_contract: contract id that the served model must have.
        headers: sent with every request (gRPC metadata), such as a key.
        tls: files for grpcs:// and https://; without, the system's authorities are trusted.
        compression: None, "gzip" or "deflate"; photographs hardly shrink, so None.
        shared_memory: "auto" (or None): system shared memory when the server is on this host, else the wire (`way` says
            which and why); faces on a GPU go through CUDA shared memory where the server's model runs on a GPU
            (`gpu_way`). "system": the same without CUDA. "cuda": CUDA for all faces, else as "auto", with a warning.
            False: never. True: as "auto", and an error when there is only the wire.
    """

    takes_gpu_faces = True

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
        self._pid = os.getpid()
        self._live = _Live(self._pid, self._session)
        # also when it is forgotten, and at the end of the process: regions must not be left to the server
        self._finalizer = weakref.finalize(self, self._live.end)

    def encode(self, faces: Array | Sequence[Array]) -> Array:
        """Unit embeddings float32 (N,D), in order, of faces uint8 (N,112,112,3) BGR; any N, 0 too.

        Floats are taken when they are whole numbers in 0..255; one face (112,112,3) counts as N = 1. Faces on a GPU
        (torch, CuPy, JAX, Numba: uint8, C-contiguous) are copied there and never to the host where `gpu_way` is CUDA
        shared memory, and to the host otherwise. Their producer's work is waited for. Embeddings are in host memory.

        Raises:
            InvalidFaces: wrong shape, dtype or range; nothing was sent.
            ServerUnreachable, ModelNotReady, DeadlineExceeded: the server cannot answer (these fall back).
            InferenceFailed: the server answered with an error, or with rows that are not unit embeddings.
            ContractMismatch: see `expected_contract`; or the model changed under way.
            CudaFailed, DependencyMissing: the faces are on a GPU that this process cannot reach (these fall back).
        """
        faces = check_in_place(faces)
        size = self.served.max_batch_size
        if 0 < len(faces) <= size:
            rows = self._embed(self._prepared([faces]))
            return rows if rows.flags.writeable else rows.copy()
        rows = np.empty((len(faces), self._session.embedding_dim), np.float32)
        done = 0
        for answer in self._in_order(([faces[i : i + size]] for i in range(0, len(faces), size)), None):
            rows[done : done + len(answer)] = answer
            done += len(answer)
        return rows

    def encode_stream(
        self,
        items: Iterable[Array],
        *,
        batch_size: int | None = None,
        retry_for_s: float = STREAM_RETRY_FOR_S,
    ) -> Iterator[Array]:
        """Embeddings of a stream, one for each item and in order: (D,) for a face (112,112,3), (n,D) for a batch.

        At most `in_flight` requests of `batch_size` faces are held in memory; faces of several items share a request.
        The source may reuse its memory. A server that is restarted meanwhile is waited for up to `retry_for_s`; every
        face is answered once. An item on a GPU makes requests of its own, so let it be a batch.

        Args:
            items: faces or batches, uint8 BGR.
            batch_size: faces in a request; default and most: the server's max_batch_size.
            retry_for_s: how long a lost server is tried again.

        Raises:
            ConfigError: batch_size is not in 1..max_batch_size.
            What `encode` raises, when the item's turn comes.
        """
        size = stream_size(self.served, batch_size)
        return self._streamed(items, Stream(size, self._session.embedding_dim), retry_for_s)

    @property
    def served(self) -> ServedModel:
        """What the server says of the model; the first use connects, and raises what `ensure_ready` raises."""
        return self._session.served or self.ensure_ready()

    @property
    def embedding_dim(self) -> int:
        """D, the width of an embedding."""
        return self.served and self._session.embedding_dim

    @property
    def contract_id(self) -> str | None:
        """The served embedding contract; None when Triton was started without the import's overlay."""
        return self.served.contract_id

    @property
    def max_batch_size(self) -> int:
        """The most faces that go into one request."""
        return self.served.max_batch_size

    @property
    def way(self) -> Way:
        """Shared memory or the wire, and why."""
        return self._session.way

    @property
    def gpu_way(self) -> Way | None:
        """The same for faces on a GPU; None before the first ones came."""
        return self._session.gpu_way

    def ensure_ready(self) -> ServedModel:
        """Ask the server for the model now, and check its contract.

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: the server cannot answer (these fall back).
            ConfigError, ContractMismatch: it serves something else than was expected.
        """
        return run(self._session.connect(), self._transport())

    def close(self) -> None:
        """Give up the connection and the shared memory; may be called twice. Requests under way fail."""
        if self._finalizer.detach():
            self._live.end(wait=True)

    def _streamed(self, items: Iterable[Array], stream: Stream, retry_for_s: float) -> Iterator[Array]:
        chunks = chain(chain.from_iterable(map(stream.take, items)), _later(stream.rest))
        for rows in self._in_order(chunks, retry_for_s):
            yield from stream.give(rows)
        yield from stream.finished()

    def _in_order(self, chunks: Iterable[list[Faces]], retry_for_s: float | None) -> Iterator[Array]:
        """Embeddings of each chunk in order, `in_flight` requests under way; a lone chunk goes out on this thread."""
        jobs = map(self._prepared, chunks)
        head = list(islice(jobs, 2))
        if len(head) < 2:
            for job in head:
                yield self._embed(job, retry_for_s)
            return
        window: deque[tuple[Future[Array], Job]] = deque()
        try:
            for job in chain(head, jobs):
                window.append((self._live.workers(self.in_flight).submit(self._embed, job, retry_for_s), job))
                while window and (len(window) == self.in_flight or window[0][0].done()):
                    yield window.popleft()[0].result()
            while window:
                yield window.popleft()[0].result()
        finally:
            for future, job in window:
                if future.cancel():
                    self._session.drop(job)

    def _prepared(self, parts: list[Faces]) -> Job:
        transport = self._transport()
        if self._session.undecided(parts):
            run(self._session.choose_gpu_way(parts[0].device), transport)
        return self._session.prepare(parts, transport.pack)

    def _embed(self, job: Job, retry_for_s: float | None = None) -> Array:
        return run(self._session.embed(job, retry_for_s), self._transport())

    def _transport(self) -> Transport:
        if os.getpid() != self._pid:
            raise ClientUnusable(
                f"this client was opened by process {self._pid} and carried over a fork into {os.getpid()}: its "
                "threads do not survive that. Make one client in each process"
            )
        return self._live.transport(self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its arguments: it arrives in another process as a client of its own, not connected yet."""
        return _made_again, (type(self), vars(self._options))

    def __enter__(self) -> TritonEmbedder:
        """The embedder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """URL and model."""
        return f"{type(self).__name__}({str(self.address)!r}, model={self.model!r})"


def stream_size(served: ServedModel, batch_size: int | None) -> int:
    """Faces in a full request of a stream.

    Raises:
        ConfigError: the server takes no such batch.
    """
    size = served.max_batch_size if batch_size is None else batch_size
    if not 1 <= size <= served.max_batch_size:
        raise ConfigError(f"batch_size is {size}; expected 1..{served.max_batch_size}, the server's max_batch_size.")
    return size


class _Live:
    """What an embedder has open; apart from it, so that it can be ended when the embedder is forgotten."""

    def __init__(self, pid: int, session: Session) -> None:
        self._pid = pid
        self._session = session
        self._lock = threading.Lock()
        self._ended = False
        self._transport: Transport | None = None
        self._workers: ThreadPoolExecutor | None = None

    def transport(self, options: Options) -> Transport:
        with self._lock:
            if self._ended:
                raise ClientUnusable("this client is closed; make a new one.")
            if self._transport is None:
                self._transport = open_transport(options.connection())
            return self._transport

    def workers(self, count: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._ended:
                raise ClientUnusable("this client is closed; make a new one.")
            if self._workers is None:
                self._workers = ThreadPoolExecutor(count, thread_name_prefix="arcface-triton")
            return self._workers

    def end(self, wait: bool = False) -> None:
        if os.getpid() != self._pid:
            return  # the parent's connection and regions are not a forked child's to close
        with self._lock:
            self._ended = True
            transport, workers = self._transport, self._workers
            self._transport = self._workers = None
        if transport is None:
            return
        run(self._session.detach(), transport)
        transport.close()
        if workers:
            workers.shutdown(wait=wait, cancel_futures=True)  # forgotten on a worker: it cannot wait for itself


def _later(chunks: Any) -> Iterator[list[Array]]:
    """`chunks()`, called when its turn comes."""
    yield from chunks()


def _made_again(kind: type[TritonEmbedder], arguments: dict[str, Any]) -> TritonEmbedder:
    return kind(**arguments)
