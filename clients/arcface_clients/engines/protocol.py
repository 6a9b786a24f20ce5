"""The protocol of every engine: aligned faces in, unit embeddings out."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, TypeGuard, runtime_checkable

from arcface_clients.arrays import Array, FloatArray
from arcface_clients.faces.check import FacesLike


@runtime_checkable
class EmbeddingEngine(Protocol):
    """Anything that embeds faces: a server's client, a plan, an ONNX file, InsightFace, or a chain of them.

    Construction is cheap: it checks arguments and loads nothing. An engine may be used from several threads.
    An unavailable backend raises `BackendUnavailable`, on which a chain falls back; the caller's mistakes raise
    `InvalidFaces` and `ConfigError`, on which it never does.
    """

    @property
    def embedding_dim(self) -> int:
        """Width D of an embedding; may connect or load.

        Raises:
            BackendUnavailable: falls back.
        """
        ...

    @property
    def contract_id(self) -> str | None:
        """Says which embeddings these may be compared with; None if unknown. May connect, never loads weights.

        Raises:
            BackendUnavailable: falls back.
        """
        ...

    def ensure_ready(self) -> object:
        """Load or connect now, so that the first `encode` is not slow; calling it again is free.

        The return value depends on the engine, such as a server's description of its model; most return None.

        Raises:
            BackendUnavailable: falls back.
        """
        ...

    def encode(self, faces: Array, /) -> FloatArray:
        """Embeddings of faces, in order: uint8 (N,112,112,3) BGR, any N ≥ 0 → float32 (N,D), rows of unit L2 norm.

        Raises:
            InvalidFaces: the array does not fit the tensor contract; never falls back.
            InferenceFailed: the backend failed on this input; never falls back.
            BackendUnavailable: falls back.
        """
        ...

    def close(self) -> None:
        """Release memory and connections; calling it again does nothing."""
        ...

    def __enter__(self) -> EmbeddingEngine:
        """The engine itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""
        ...


class GpuFacesEngine(EmbeddingEngine, Protocol):
    """An engine that accepts faces on a GPU directly; others get a copy in host memory."""

    takes_gpu_faces: bool

    def encode(self, faces: FacesLike, /) -> FloatArray:
        """As `EmbeddingEngine.encode`."""
        ...


def takes_gpu_faces(engine: EmbeddingEngine) -> TypeGuard[GpuFacesEngine]:
    """Whether an engine accepts faces on a GPU."""
    return bool(getattr(engine, "takes_gpu_faces", False))
