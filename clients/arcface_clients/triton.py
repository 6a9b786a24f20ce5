"""TritonEmbedder: faces in, embeddings from a Triton server out."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from types import TracebackType

import numpy as np

from arcface_clients.address import Address
from arcface_clients.contract import check_faces
from arcface_clients.errors import ClientUnusable, ConfigError
from arcface_clients.served_model import ServedModel
from arcface_clients.session import Session, run
from arcface_clients.transports import Transport, open_transport

IN_FLIGHT = 4


class TritonEmbedder:
    """Embeddings from a Triton server; safe to use from many threads, connects with the first use.

    Args:
        url: `host:port` or `grpc://host:port`.
        model: served model, normally the ensemble `arcface`.
        timeout_s: longest wait for the answer to one request of up to max_batch_size faces, queueing included.
        in_flight: requests under way at a time when there are more faces than fit one.
        retry_for_s: how long a lost server or an unloaded model is tried again; 0: not at all.
        expected_contract: contract id that the served model must have.
        headers: sent with every request (gRPC metadata), such as an API key.
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
    ) -> None:
        """Check the arguments; nothing is sent yet."""
        self.address = Address.parse(url)
        if timeout_s <= 0 or in_flight < 1 or retry_for_s < 0:
            raise ConfigError(
                f"expected timeout_s > 0, in_flight ≥ 1 and retry_for_s ≥ 0, "
                f"got {timeout_s}, {in_flight}, {retry_for_s}."
            )
        self.model = model
        self.in_flight = in_flight
        self._headers = dict(headers or {})
        self._session = Session(
            str(self.address), model, timeout_s=timeout_s, retry_for_s=retry_for_s, expected_contract=expected_contract
        )
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        self._workers: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self._closed = False

    def encode(self, faces: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Unit embeddings float32 (N,D), in order, of faces uint8 (N,112,112,3) BGR; any N, 0 too.

        Floats are taken when they are whole numbers in 0..255; one face (112,112,3) counts as N = 1.

        Raises:
            InvalidFaces: wrong shape, dtype or range; nothing was sent.
            ServerUnreachable, ModelNotReady, DeadlineExceeded: the server cannot answer (these fall back).
            InferenceFailed: the server answered with an error, or with rows that are not unit embeddings.
            ContractMismatch: see `expected_contract`.
        """
        faces = check_faces(faces)
        served = self.served
        rows = np.empty((len(faces), self._session.embedding_dim), np.float32)
        size = served.max_batch_size
        done = 0
        for answer in self._in_order([faces[i : i + size]] for i in range(0, len(faces), size)):
            rows[done : done + len(answer)] = answer
            done += len(answer)
        return rows

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

    def ensure_ready(self) -> ServedModel:
        """Ask the server for the model now, and check its contract.

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: the server cannot answer (these fall back).
            ConfigError, ContractMismatch: it serves something else than was expected.
        """
        return run(self._session.connect(), self._opened())

    def close(self) -> None:
        """Give up the connection; may be called twice."""
        with self._lock:
            self._closed = True
            transport, workers = self._transport, self._workers
            self._transport = self._workers = None
        if os.getpid() != self._pid:
            return  # the parent's connection is not ours to close
        if transport:
            transport.close()
        if workers:
            workers.shutdown(wait=True, cancel_futures=True)

    def _embed(self, body: bytes, count: int) -> np.ndarray:
        return run(self._session.embed(body, count), self._opened())

    def _in_order(self, chunks: Iterable[list[np.ndarray]]) -> Iterator[np.ndarray]:
        """Embeddings of each chunk in order, `in_flight` requests under way; a lone chunk goes out on this thread."""
        chunks = iter(chunks)
        head = list(islice(chunks, 2))
        if len(head) < 2:
            for chunk in head:
                yield self._embed(*self._packed(chunk))
            return
        window: deque[Future[np.ndarray]] = deque()
        try:
            for chunk in chain(head, chunks):
                if len(window) == self.in_flight:
                    yield window.popleft().result()
                window.append(self._pool().submit(self._embed, *self._packed(chunk)))
            while window:
                yield window.popleft().result()
        finally:
            for waiting in window:
                waiting.cancel()

    def _packed(self, chunk: list[np.ndarray]) -> tuple[bytes, int]:
        return self._opened().pack(self.model, chunk), sum(len(part) for part in chunk)

    def _opened(self) -> Transport:
        if os.getpid() != self._pid:
            raise ClientUnusable(
                f"this client was opened by process {self._pid} and carried over a fork into {os.getpid()}: "
                "gRPC's threads do not survive that. Make one client in each process"
            )
        with self._lock:
            if self._closed:
                raise ClientUnusable("this client is closed; make a new one.")
            if self._transport is None:
                self._transport = open_transport(self.address, self._headers)
            return self._transport

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise ClientUnusable("this client is closed; make a new one.")
            if self._workers is None:
                self._workers = ThreadPoolExecutor(self.in_flight, thread_name_prefix="arcface-triton")
            return self._workers

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
        return f"TritonEmbedder({str(self.address)!r}, model={self.model!r})"
