"""Every error of both packages has one root; each message says what happened, expected against got, the next command.

ArcFaceError
├── InvalidFaces          the caller's array is wrong            never falls back   exit 2
├── InvalidEmbeddings     zero rows, NaN, widths that differ     never falls back   exit 2
├── WrongUse              arguments that cannot work             never falls back   exit 2
│   └── ConfigError           a key or value in the configuration
├── ContractMismatch      embeddings of two different contracts  never falls back   exit 2
├── GateFailed            drift above its limit                  never falls back   exit 1
├── PlanRefused           truncated, foreign, unsigned, replayed never falls back   exit 1
├── InferenceFailed       the backend answered with an error     never falls back   exit 1
│   └── SharedMemoryLost      the server does not know our region; the client then registers it again
├── ClientUnusable        closed, or carried into a fork         never falls back   exit 2
├── Missing               a file, program or network is not there never falls back  exit 3
└── BackendUnavailable    the backend is not there               FALLS BACK         exit 3
    ├── ServerUnreachable     no server answers at the address
    ├── ModelNotReady         the server has no such model, or it is not loaded
    ├── ModelMissing          no ONNX file or plan for this host
    ├── InvalidAnswer         what answers there is no Triton server, or the answer is damaged or another request's
    ├── Overloaded            the server's queue is full, or it dropped the request from it
    ├── DeadlineExceeded      no answer within timeout_s or total_timeout_s
    ├── DependencyMissing     a package or a program is not installed
    └── CudaFailed            the GPU's driver refused: no room, no such GPU, or the GPU is lost

What only the build can raise stands in `arcface_build.errors`, under the same root.
"""

from __future__ import annotations


class ArcFaceError(Exception):
    """Root of all errors of this package; `exit_code` is what a command line returns for it."""

    exit_code = 1


class InvalidFaces(ArcFaceError, ValueError):
    """The faces do not fit the tensor contract (shape, dtype, range). Never falls back: no backend could answer it."""

    exit_code = 2


class InvalidEmbeddings(ArcFaceError, ValueError):
    """Embeddings that have no direction (zero, NaN) or do not fit together (shape, width). Never falls back."""

    exit_code = 2


class WrongUse(ArcFaceError, ValueError):
    """Arguments or settings that cannot work together. Never falls back."""

    exit_code = 2


class ConfigError(WrongUse):
    """A configuration key is unknown or its value impossible; `key`: which, if it is one alone. Never falls back."""

    def __init__(self, message: str, key: str | None = None) -> None:
        """The message names the key as well."""
        super().__init__(message)
        self.key = key


class ContractMismatch(ArcFaceError, ValueError):
    """Embeddings of two contracts were about to be compared or mixed. Never falls back."""

    exit_code = 2


class GateFailed(ArcFaceError):
    """Drift, accuracy or a benchmark is outside its limit. Never falls back."""

    exit_code = 1


class PlanRefused(ArcFaceError):
    """A plan is truncated, of another key, unsigned where a key is configured, or not of the precision asked for."""

    exit_code = 1


class InferenceFailed(ArcFaceError):
    """The backend is there and answered this request with an error. Never falls back: the cause would be hidden."""

    exit_code = 1


class SharedMemoryLost(InferenceFailed):
    """The server does not know the shared memory region; the client handles this itself. Never falls back."""


class ClientUnusable(ArcFaceError, RuntimeError):
    """The client was closed, or was opened by another process and carried over a fork. Never falls back."""

    exit_code = 2


class Missing(ArcFaceError):
    """Something needed is not on this host. Never falls back."""

    exit_code = 3


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


class CudaFailed(BackendUnavailable):
    """The CUDA driver refused a call: no room on the GPU, no such GPU, or it is lost to this process. Falls back."""
