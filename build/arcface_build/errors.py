"""Errors that only the build raises; the root and the errors shared by both packages are in `arcface_clients.errors`.

ArcFaceError
├── SourceRefused       this file cannot become a serving model       exit 2
├── WrongUse
│   └── LicenceNotAccepted
├── ProofFailed         the result differs from the reference         exit 1
└── Missing
    ├── PlanNotFound
    └── ServerFailed    tritonserver did not start or did not become ready
"""

from __future__ import annotations

from arcface_clients.errors import ArcFaceError, Missing, WrongUse
from arcface_clients.errors import StoreUnreachable as StoreUnreachable


class SourceRefused(ArcFaceError, ValueError):
    """The source cannot become a serving model; the message says why in one sentence."""

    exit_code = 2


class LicenceNotAccepted(WrongUse):
    """A download needs `--accept-license` first."""


class ProofFailed(ArcFaceError):
    """The artefact differs from the reference by more than its limit; it was not written under its final name."""

    exit_code = 1


class PlanNotFound(Missing):
    """No plan of this key in the cache or the store, and building one was disabled or impossible."""


class ServerFailed(Missing):
    """tritonserver did not start, or did not become ready in time."""
