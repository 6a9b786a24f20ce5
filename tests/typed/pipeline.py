"""A user's program as a type checker sees it; tests/test_typed.py runs mypy --strict on it, nothing runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from arcface_clients import (
    AsyncTritonEmbedder,
    EmbeddingEngine,
    EngineRegistry,
    FakeEmbedder,
    FallbackEmbedder,
    Tls,
    TritonEmbedder,
    get_embedding_backend,
)

Faces = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]


@EngineRegistry.register("mine")
class MyEngine:
    """An engine of the user's own."""

    def __init__(self, dim: int = 512) -> None:
        self._dim = dim

    @property
    def embedding_dim(self) -> int:
        return self._dim

    @property
    def contract_id(self) -> str | None:
        return None

    def ensure_ready(self) -> None:
        return None

    def encode(self, faces: npt.NDArray[Any]) -> Rows:
        return np.ones((len(faces), self._dim), np.float32) / np.float32(self._dim**0.5)

    def close(self) -> None:
        return None

    def __enter__(self) -> MyEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@EngineRegistry.register("my-server")
def my_server(port: int) -> TritonEmbedder:
    return TritonEmbedder(f"localhost:{port}")


def chains() -> list[EmbeddingEngine]:
    server = TritonEmbedder(
        "grpcs://gpu:8001",
        "arcface",
        timeout_s=3,
        in_flight=2,
        headers={"authorization": "…"},
        tls=Tls(ca_file="ca.pem"),
        shared_memory="system",
    )
    chain = FallbackEmbedder([server, MyEngine(), ("spare", FakeEmbedder)], retry_after_s=1)
    return [chain, server, FakeEmbedder(fails=[None, ConnectionError()]), EngineRegistry.get("mine", dim=128)]


def embed(engine: EmbeddingEngine, faces: Faces) -> Rows:
    with engine:
        engine.ensure_ready()
        return engine.encode(faces)


def stream(embedder: TritonEmbedder, faces: Iterator[Faces]) -> Iterator[Rows]:
    limit: int = embedder.served.max_batch_size
    yield from embedder.encode_stream(faces, batch_size=min(limit, 8))


def pipeline(faces: Faces) -> tuple[Rows, str | None]:
    with get_embedding_backend("triton", device="cpu", allow_cpu_fallback=False) as backend:
        rows: Rows = backend.encode(faces)
        return rows, backend.last_engine


async def camera(faces: Faces) -> AsyncIterator[Faces]:
    for face in faces:
        yield face
        await asyncio.sleep(0)


async def asynchronous(faces: Faces) -> list[Rows]:
    async with AsyncTritonEmbedder("http://gpu:8000", retry_for_s=0) as embedder:
        first: Rows = await embedder.encode(faces)
        kind: str | None = embedder.shared_memory.kind
        return [first, *[row async for row in embedder.encode_stream(camera(faces))]] if kind else [first]
