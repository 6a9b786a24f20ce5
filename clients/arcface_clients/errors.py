"""The errors of both packages, under one root. A message says what happened, what was expected, and what to run next.

ArcFaceError
├── InvalidFaces          the caller's array is wrong            never falls back   exit 2
├── InvalidEmbeddings     zero rows, NaN, different widths       never falls back   exit 2
├── WrongUse              arguments that cannot work             never falls back   exit 2
│   └── ConfigError           a key or value in the configuration
├── ContractMismatch      embeddings of two different contracts  never falls back   exit 2
├── DetectorMismatch      faces found by two detectors           never falls back   exit 2
├── GateFailed            drift above its limit                  never falls back   exit 1
├── PlanRefused           truncated, foreign, unsigned, replayed never falls back   exit 1
├── InferenceFailed       the backend answered with an error     never falls back   exit 1
│   └── SharedMemoryLost      the server does not know our region; the client then registers it again
├── ClientUnusable        closed, or carried into a fork         never falls back   exit 2
├── Missing               no such file, program or network       never falls back   exit 3
│   └── StoreUnreachable      the object store does not answer, or refuses
└── BackendUnavailable    the backend cannot answer at all       FALLS BACK         exit 3
    ├── ServerUnreachable     no server answers at the address
    ├── ModelNotReady         the server has no such model, or it is not loaded
    ├── ModelMissing          no ONNX file or plan for this host
    ├── InvalidAnswer         what answers there is no Triton server, or the answer is damaged or another request's
    ├── Overloaded            the server's queue is full, or it dropped the request from it
    ├── DeadlineExceeded      no answer within timeout_s or total_timeout_s
    ├── DependencyMissing     a package or a program is not installed
    ├── OutOfMemory           a model needs more memory than this process may take
    └── CudaFailed            the CUDA driver refused: out of memory, no such GPU, or the GPU is lost

Errors that only the build raises are in `arcface_build.errors`, under the same root.
"""

from __future__ import annotations


class ArcFaceError(Exception):
    """Root of all errors of this package; `exit_code` is what a command line returns for it."""

    exit_code = 1


class InvalidFaces(ArcFaceError, ValueError):
    """The faces do not fit the tensor contract (shape, dtype, range). Never falls back: no backend could embed them."""

    exit_code = 2


class InvalidEmbeddings(ArcFaceError, ValueError):
    """Embeddings without a direction (zero, NaN), or of mismatched shape or width. Never falls back."""

    exit_code = 2


class WrongUse(ArcFaceError, ValueError):
    """Arguments or settings that cannot work together. Never falls back."""

    exit_code = 2


class ConfigError(WrongUse):
    """A configuration key is unknown or its value invalid; `key` names it if only one is at fault. Never falls back."""

    def __init__(self, message: str, key: str | None = None) -> None:
        """The message should name the key too."""
        super().__init__(message)
        self.key = key


class ContractMismatch(ArcFaceError, ValueError):
    """Embeddings of two different contracts were about to be compared or mixed. Never falls back."""

    exit_code = 2


class DetectorMismatch(ArcFaceError, ValueError):
    """Faces that two detectors found, or one with other limits, were about to be mixed. Never falls back."""

    exit_code = 2


class GateFailed(ArcFaceError):
    """Drift, accuracy or a benchmark is outside its limit. Never falls back; but a chain leaves out such an engine."""

    exit_code = 1


class PlanRefused(ArcFaceError):
    """A plan is truncated, has another key, lacks a required signature, or is not of the requested precision."""

    exit_code = 1


class InferenceFailed(ArcFaceError):
    """The backend answered this request with an error. Never falls back: that would hide the cause."""

    exit_code = 1


class SharedMemoryLost(InferenceFailed):
    """The server does not know the shared memory region; the client handles this itself. Never falls back."""


class ClientUnusable(ArcFaceError, RuntimeError):
    """The client was closed, or was opened in another process and carried across a fork. Never falls back."""

    exit_code = 2


class Missing(ArcFaceError):
    """Something needed is not on this host. Never falls back."""

    exit_code = 3


class StoreUnreachable(Missing):
    """The object store did not answer, refused the credentials, or has no such bucket. Never falls back."""


class BackendUnavailable(ArcFaceError, ConnectionError):
    """The backend cannot answer at all. Falls back to the next engine of a chain."""

    exit_code = 3


class ServerUnreachable(BackendUnavailable):
    """No server answers at the address. Falls back."""


class ModelNotReady(BackendUnavailable):
    """The server answers, but the model is unknown to it or not loaded. Falls back."""


class ModelMissing(BackendUnavailable):
    """The file that an in-process engine reads (serving ONNX, plan, source) is not on this host. Falls back."""


class InvalidAnswer(BackendUnavailable):
    """The answer is no Triton answer, is damaged or is another request's; it is asked again. Falls back.

    A well-formed answer with the wrong tensors in it (NaN, other shapes) is the model's fault: `InferenceFailed`.
    """


class Overloaded(BackendUnavailable):
    """The server is there and has too much to do; it is asked again, with growing pauses. Falls back."""


class DeadlineExceeded(BackendUnavailable, TimeoutError):
    """No answer within `timeout_s`, or not all of them within `total_timeout_s`. Falls back."""


class DependencyMissing(BackendUnavailable):
    """A package or program that this engine needs is not installed. Falls back."""


class OutOfMemory(BackendUnavailable, MemoryError):
    """A model needs more memory than this process may take (host, container or `ulimit -d`). Falls back."""


class CudaFailed(BackendUnavailable):
    """The CUDA driver refused a call: out of memory, no such GPU, or this process has lost the GPU. Falls back."""
