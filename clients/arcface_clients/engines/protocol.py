"""What every engine is, on one page: aligned faces in, unit embeddings out."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, TypeGuard, runtime_checkable

from arcface_clients.arrays import Array, FloatArray
from arcface_clients.faces.check import FacesLike


@runtime_checkable
class EmbeddingEngine(Protocol):
    """Anything that embeds faces: a server's client, a plan, an ONNX file, InsightFace, or a chain of them.

    Constructing one is cheap: it checks arguments and loads nothing. An engine may be used from several threads.
    Errors that mean "this backend is not there" are `BackendUnavailable` (a chain falls back on them); the caller's
    mistakes are `InvalidFaces` and `ConfigError` (a chain never falls back on those).
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
        """Which embeddings these may be compared with; None where it is not known. May connect, never loads weights.

        Raises:
            BackendUnavailable: falls back.
        """
        ...

    def ensure_ready(self) -> object:
        """Load or connect now, so that the first `encode` is not the slow one; calling it again is free.

        What it returns is the engine's own, such as what a server says of its model; None from most.

        Raises:
            BackendUnavailable: falls back.
        """
        ...

    def encode(self, faces: Array, /) -> FloatArray:
        """Embeddings of faces, in order: uint8 (N,112,112,3) BGR, any N ≥ 0 → float32 (N,D), rows of unit L2 norm.

        Raises:
            InvalidFaces: the array does not fit the tensor contract; never falls back.
            InferenceFailed: the backend is there and failed on this input; never falls back.
            BackendUnavailable: falls back.
        """
        ...

    def close(self) -> None:
        """Give memory and connections back; calling it again does nothing."""
        ...

    def __enter__(self) -> EmbeddingEngine:
        """The engine itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the engine."""
        ...


class GpuFacesEngine(EmbeddingEngine, Protocol):
    """An engine that takes faces on a GPU as they are; the others are given a copy in host memory."""

    takes_gpu_faces: bool

    def encode(self, faces: FacesLike, /) -> FloatArray:
        """As `EmbeddingEngine.encode`."""
        ...


def takes_gpu_faces(engine: EmbeddingEngine) -> TypeGuard[GpuFacesEngine]:
    """Whether an engine says that it takes faces on a GPU."""
    return bool(getattr(engine, "takes_gpu_faces", False))
