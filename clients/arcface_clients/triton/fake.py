"""FakeEmbedder: TritonEmbedder's manners without a server, for tests of code that uses one; faces in, unit rows out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.errors import ClientUnusable
from arcface_clients.faces.check import check_faces
from arcface_clients.triton.route import Way
from arcface_clients.triton.served import ServedModel
from arcface_clients.triton.streaming import Stream


class FakeEmbedder:
    """Deterministic embeddings: equal pixels give equal rows, different ones nearly orthogonal rows (|cosine| ~ 1/√D).

    Not a recogniser: two pictures of one person are as far apart as any two. It checks faces as the real one does.

    Args:
        embedding_dim: D.
        contract_id: what it claims to serve.
        fails: what the next calls of `encode` do, one entry each: an exception to raise, or None to answer. A
            stream takes one entry for each request.
        max_batch_size: faces in one request of a stream.

    `calls` lists the number of faces of each call of `encode`, those that failed too.
    """

    def __init__(
        self,
        embedding_dim: int = 512,
        *,
        contract_id: str | None = "fake",
        fails: Iterable[Exception | None] = (),
        max_batch_size: int = 64,
    ) -> None:
        """Ready at once."""
        self.embedding_dim = embedding_dim
        self.contract_id = contract_id
        self.max_batch_size = max_batch_size
        self.calls: list[int] = []
        self.way = Way(None, "there is no server")
        self._fails = iter(fails)
        self._closed = False

    @property
    def served(self) -> ServedModel:
        """What a server would say."""
        return ServedModel(
            "fake", "fake", "fake", self.max_batch_size, self.embedding_dim, self.contract_id, precision="fp32"
        )

    def encode(self, faces: Array | Sequence[Array]) -> Array:
        """Unit rows float32 (N,D) from the digest of each face.

        Raises:
            InvalidFaces: wrong shape, dtype or range.
            What `fails` says.
        """
        if self._closed:
            raise ClientUnusable("this client is closed; make a new one.")
        faces = check_faces(faces)
        self.calls.append(len(faces))
        failure = next(self._fails, None)
        if failure is not None:
            raise failure
        rows = np.empty((len(faces), self.embedding_dim), np.float32)
        for row, face in zip(rows, faces, strict=True):
            seed = int.from_bytes(hashlib.sha256(face.data).digest()[:8], "little")
            row[:] = np.random.default_rng(seed).standard_normal(self.embedding_dim, np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)

    def encode_stream(self, items: Iterable[Array], *, batch_size: int | None = None) -> Iterator[Array]:
        """Rows for each face or batch, in order, as `TritonEmbedder.encode_stream` gives them."""
        stream = Stream(batch_size or self.max_batch_size, self.embedding_dim)
        for item in items:
            for parts in stream.take(item):
                yield from stream.give(self.encode(np.concatenate(parts)))
        for parts in stream.rest():
            yield from stream.give(self.encode(np.concatenate(parts)))
        yield from stream.finished()

    def ensure_ready(self) -> ServedModel:
        """Always ready, until closed."""
        if self._closed:
            raise ClientUnusable("this client is closed; make a new one.")
        return self.served

    def close(self) -> None:
        """From now on every call raises ClientUnusable."""
        self._closed = True

    def __enter__(self) -> FakeEmbedder:
        """The embedder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
