"""TritonEmbedder: faces in, embeddings from a Triton server out."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain, islice
from math import inf

from arcface_clients.arrays import FloatArray
from arcface_clients.closing import Closing
from arcface_clients.faces.check import Faces, FacesLike, check_in_place
from arcface_clients.faces.synthetic import synthetic_faces
from arcface_clients.triton.answer import Answer, Rows
from arcface_clients.triton.client import STREAM_RETRY_FOR_S, TritonClient
from arcface_clients.triton.live import Live, in_turn
from arcface_clients.triton.options import check_retry
from arcface_clients.triton.sansio import run
from arcface_clients.triton.served import ServedModel
from arcface_clients.triton.session import InferRequest
from arcface_clients.triton.streaming import Stream
from arcface_clients.triton.transports import Transport, open_transport


class TritonEmbedder(TritonClient, Closing):
    """Embeddings from a Triton server; safe to use from many threads, connects with the first use.

    The arguments are the fields of `ClientOptions`.
    """

    def _set_up(self) -> None:
        super()._set_up()
        regions = self._session.regions
        self._live = Live(self._opener(), lambda transport: run(regions.detach(), transport))
        # also when it is forgotten, and at the end of the process: regions must not be left to the server
        self._finalizer = weakref.finalize(self, self._live.end)

    def encode(self, faces: FacesLike) -> FloatArray:
        """Unit embeddings float32 (N,D), in order, of faces uint8 (N,112,112,3) BGR; any N, 0 too.

        Floats are taken when they are whole numbers in 0..255; one face (112,112,3) counts as N = 1. Faces on a GPU
        (torch, CuPy, JAX, Numba: uint8, C-contiguous) stay there where `gpu_shared_memory` is CUDA shared memory, and
        are copied to the host otherwise. Their producer's work is waited for. Embeddings are in host memory.

        Raises:
            InvalidFaces: wrong shape, dtype or range; nothing was sent.
            ServerUnreachable, ModelNotReady, DeadlineExceeded: the server cannot answer (these fall back).
            InferenceFailed: the server answered with an error, or with rows that are not unit embeddings.
            ContractMismatch: see `expected_contract`; or the model changed under way.
            CudaFailed, DependencyMissing: the faces are on a GPU that this process cannot reach (these fall back).
        """
        return self._encode(faces, norms=False).embeddings

    def encode_with_norms(self, faces: FacesLike) -> tuple[FloatArray, FloatArray]:
        """Embeddings as `encode` gives them, and float32 (N,): their lengths before they were cut to unit length.

        A short one is the mark of a poor picture: blurred, dark, turned away, or no face at all.

        Raises:
            WrongUse: the model was imported before it told them.
            What `encode` raises.
        """
        answer = self._encode(faces, norms=True)
        return answer.embeddings, answer.norms

    def _encode(self, faces: FacesLike, norms: bool) -> Answer:
        checked, deadline_s = check_in_place(faces), self._session.deadline_s()
        size = self._known(deadline_s).max_batch_size
        chunks = ([checked[i : i + size]] for i in range(0, len(checked), size))
        if 0 < len(checked) <= size:
            (answer,) = self._in_order(chunks, None, norms, deadline_s)
            return answer.owned()
        rows = Rows(len(checked), self._session.embedding_dim, norms)
        for answer in self._in_order(chunks, None, norms, deadline_s):
            rows.add(answer)
        return rows.whole

    def encode_stream(
        self,
        items: Iterable[FacesLike],
        *,
        batch_size: int | None = None,
        retry_for_s: float = STREAM_RETRY_FOR_S,
        normalized: bool = True,
    ) -> Iterator[FloatArray]:
        """Embeddings of a stream, one for each item and in order: (D,) for a face (112,112,3), (n,D) for a batch.

        At most `in_flight` requests of `batch_size` faces are held in memory; faces of several items share a request.
        The source may reuse its memory. A server that is restarted meanwhile is waited for up to `retry_for_s`; every
        face is answered once. An item on a GPU makes requests of its own, so let it be a batch.

        Args:
            items: faces or batches, uint8 BGR.
            batch_size: faces in a request; default and most: the server's max_batch_size.
            retry_for_s: how long a lost server is tried again.
            normalized: False gives rows of the length that the network gave them, as InsightFace does.

        Raises:
            ConfigError: batch_size is not in 1..max_batch_size, or retry_for_s no time.
            WrongUse: `normalized` is False, and the model was imported before it told its norms.
            What `encode` raises, when the item's turn comes.
        """
        check_retry(retry_for_s)
        size = self._stream_size(self._known(), batch_size)
        return self._streamed(items, Stream(size, self._session.embedding_dim), retry_for_s, not normalized)

    @property
    def served(self) -> ServedModel:
        """What the server says of the model; the first use connects, and raises what `ensure_ready` raises."""
        return self._session.tell(self._known())

    def ensure_ready(self) -> ServedModel:
        """Ask the server for the model now, and check its contract.

        Raises:
            ServerUnreachable, ModelNotReady, DeadlineExceeded: the server cannot answer (these fall back).
            ConfigError, ContractMismatch: it serves something else than was expected.
        """
        return self._session.tell(run(self._session.connect(), self._transport()))

    def close(self) -> None:
        """Give up the connection and the shared memory; may be called twice. Requests under way fail."""
        if self._finalizer.detach():
            self._live.end(wait=True)

    def _known(self, deadline_s: float = inf) -> ServedModel:
        session = self._session
        return session.served or run(session.in_time(session.connect(), deadline_s), self._transport())

    def _streamed(
        self, items: Iterable[FacesLike], stream: Stream, retry_for_s: float, norms: bool
    ) -> Iterator[FloatArray]:
        chunks = chain(chain.from_iterable(map(stream.take, items)), _later(stream.rest))
        for answer in self._in_order(chunks, retry_for_s, norms):
            yield from stream.give(answer.features if norms else answer.embeddings)
        yield from stream.finished()

    def _in_order(
        self,
        chunks: Iterable[list[Faces]],
        retry_for_s: float | None,
        norms: bool = False,
        deadline_s: float | None = None,
    ) -> Iterator[Answer]:
        """The answer to each chunk in order, `in_flight` requests under way; a lone chunk goes out on this thread.

        `deadline_s`: of all of them; None: each has `total_timeout_s` for itself.
        """
        requests = (self._prepared(chunk, norms) for chunk in chunks)
        head: deque[InferRequest] = deque()
        try:
            head.extend(islice(requests, 2))
            if len(head) == 1:
                yield self._embed(head.popleft(), retry_for_s, deadline_s)
            waiting = (head.popleft() for _ in range(len(head)))
            begun = (self._submit(request, retry_for_s, deadline_s) for request in chain(waiting, requests))
            yield from in_turn(begun, self.options.in_flight)
        finally:
            for request in head:  # the source, or whoever wants the answers, gave up before their turn
                self._session.drop(request)

    def _submit(self, request: InferRequest, retry_for_s: float | None, deadline_s: float | None) -> Future[Answer]:
        try:
            future = self._live.submit(self.options.in_flight, self._embed, request, retry_for_s, deadline_s)
        except BaseException:
            self._session.drop(request)
            raise
        future.add_done_callback(lambda _: self._session.drop(request))  # also when it is cancelled before it ran
        return future

    def _prepared(self, parts: list[Faces], norms: bool) -> InferRequest:
        transport = self._transport()
        run(self._session.welcome(parts), transport)
        return self._session.prepare(parts, transport.pack, norms)

    def _embed(self, request: InferRequest, retry_for_s: float | None, deadline_s: float | None) -> Answer:
        session = self._session
        deadline_s = session.deadline_s() if deadline_s is None else deadline_s
        return run(session.in_time(session.embed(request, retry_for_s), deadline_s), self._transport())

    def _transport(self) -> Transport:
        return self._live.transport()

    def _opener(self) -> Callable[[], Transport]:
        """What opens the transport; it must not hold this embedder, which may be forgotten before."""
        return partial(open_transport, self.options.connection())


def named_contract(embedder: TritonEmbedder) -> str | None:
    """The contract id of the served model, or its first 32 digits where only its answers name it; asks the server.

    None: it does not name its contract.

    Raises:
        What `encode` raises.
    """
    if embedder.ensure_ready().contract_id is None:  # a bare tritonserver, without the import's overlay
        embedder.encode(synthetic_faces(1))
    return embedder.contract_id or embedder.contract_prefix


def _later(chunks: Callable[[], list[list[Faces]]]) -> Iterator[list[Faces]]:
    """`chunks()`, called when its turn comes."""
    yield from chunks()
