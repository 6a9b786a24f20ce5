"""FakeEmbedder: a TritonEmbedder whose transport makes the embeddings up, for tests of code that uses one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from arcface_clients.arrays import Array
from arcface_clients.contract import (
    CONTRACT_OUTPUT,
    EMBEDDING_OUTPUT,
    FACE_INPUT,
    FACE_SHAPE,
    NORM_OUTPUT,
    contract_words,
)
from arcface_clients.errors import InferenceFailed
from arcface_clients.triton.answer import Tensors
from arcface_clients.triton.embedder import TritonEmbedder
from arcface_clients.triton.memory.system import Slot
from arcface_clients.triton.transports import Files, Parameter, Transport


class FakeEmbedder(TritonEmbedder):
    """Deterministic embeddings: equal pixels give equal rows, different ones nearly orthogonal rows (|cosine| ~ 1/√D).

    Not a recogniser: two pictures of one person are as far apart as any two. All but the server is the real thing:
    faces are checked, split and streamed by the code of `TritonEmbedder`.

    Args:
        embedding_dim: D.
        contract_id: what it claims to serve.
        fails: what the next requests do, one entry each: an exception to raise, or None to answer.
        max_batch_size: the most faces in one request.

    Attributes:
        calls: the number of faces of each request, those that failed too.
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
        self.calls: list[int] = []
        self._fake = FakeTransport(embedding_dim, contract_id, iter(fails), max_batch_size, self.calls)
        super().__init__("fake", "fake", in_flight=1, retry_for_s=0, shared_memory=False)

    def _opener(self) -> Callable[[], Transport]:
        fake = self._fake
        return lambda: fake

    def __reduce__(self) -> tuple[Any, ...]:
        """Not pickled: `fails` and `calls` would part."""
        raise TypeError("a FakeEmbedder stays in its process: make one in each.")


class FakeTransport:
    """What a server would answer, without one."""

    def __init__(
        self,
        embedding_dim: int,
        contract_id: str | None,
        fails: Iterator[Exception | None],
        max_batch_size: int,
        calls: list[int],
    ) -> None:
        """See `FakeEmbedder`."""
        self._embedding_dim, self._contract_id, self._max_batch_size = embedding_dim, contract_id, max_batch_size
        self._fails, self._calls = fails, calls

    def pack(self, model: str, parts: Sequence[Array], outputs: Sequence[str]) -> Array:
        """A copy of the faces."""
        return np.concatenate(parts)

    def infer(self, model: str, body: Array, timeout_s: float) -> Tensors:
        """Rows float32 (N,D) from the digest of each face, cut to unit length, or what `fails` says."""
        self._calls.append(len(body))
        failure = next(self._fails, None)
        if failure is not None:
            raise failure
        rows = np.empty((len(body), self._embedding_dim), np.float32)
        for row, face in zip(rows, body, strict=True):
            seed = int.from_bytes(hashlib.sha256(face.data).digest()[:8], "little")
            row[:] = np.random.default_rng(seed).standard_normal(self._embedding_dim, np.float32)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        tensors = {EMBEDDING_OUTPUT: rows / norms, NORM_OUTPUT: norms}
        if self._contract_id:
            tensors[CONTRACT_OUTPUT] = np.tile(self._contract_row(), (len(body), 1))
        return tensors

    def _contract_row(self) -> Array:
        """Int32 (4,): of a contract id, or of any other name that a test has for one."""
        name = str(self._contract_id)
        return contract_words(name if len(name) == 64 else hashlib.sha256(name.encode()).hexdigest())

    def model_config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """A configuration as Triton's JSON."""
        outputs = [(EMBEDDING_OUTPUT, "TYPE_FP32", self._embedding_dim), (NORM_OUTPUT, "TYPE_FP32", 1)]
        if self._contract_id:
            outputs.append((CONTRACT_OUTPUT, "TYPE_INT32", 4))
        parameters = {"contract_id": self._contract_id, "precision": "fp32"}
        return {
            "name": model,
            "backend": "fake",
            "max_batch_size": self._max_batch_size,
            "input": [{"name": FACE_INPUT, "data_type": "TYPE_UINT8", "dims": list(FACE_SHAPE)}],
            "output": [{"name": name, "data_type": kind, "dims": [width]} for name, kind, width in outputs],
            "parameters": {name: {"string_value": value} for name, value in parameters.items() if value},
        }

    def infer_shared(self, model: str, slot: Slot, count: int, outputs: Sequence[str], timeout_s: float) -> Tensors:
        """Never asked: shared memory is switched off."""
        raise InferenceFailed("the fake has no shared memory")

    def infer_files(
        self, model: str, files: Files, outputs: Sequence[str], parameters: Mapping[str, Parameter], timeout_s: float
    ) -> Tensors:
        """Never asked: it takes faces."""
        raise InferenceFailed("the fake takes faces, not photos")

    def register_shared(self, slot: Slot, timeout_s: float) -> None:
        """Never asked: shared memory is switched off."""
        raise InferenceFailed("the fake has no shared memory")

    def unregister_shared(self, name: str, timeout_s: float) -> None:
        """There is none."""

    def shared_regions(self, memory: str, timeout_s: float) -> list[str]:
        """None."""
        return []

    def sleep(self, seconds: float) -> None:
        """Not a moment: tests should be quick."""

    def close(self) -> None:
        """Nothing is open."""
