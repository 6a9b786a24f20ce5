"""Every error that the build raises; each message says what happened, expected against got, and the next command.

BuildError
├── SourceRefused       this file cannot become a serving model       exit 2
├── WrongUse            arguments or configuration that cannot work   exit 2
│   └── LicenceNotAccepted
├── ProofFailed         the result differs from the reference         exit 1
├── PlanRefused         a plan is truncated, foreign, unsigned or not of the asked precision   exit 1
└── Missing             a file, a program, a network or a GPU is not there   exit 3
    ├── PlanNotFound
    ├── StoreUnreachable
    └── ServerFailed    tritonserver did not start or did not become ready
"""

from __future__ import annotations


class BuildError(Exception):
    """Root of all errors of this package; `exit_code` is what a command line returns for it."""

    exit_code = 1


class SourceRefused(BuildError, ValueError):
    """The source cannot become a serving model; the message says why in one sentence."""

    exit_code = 2


class WrongUse(BuildError, ValueError):
    """Arguments or configuration that cannot work together."""

    exit_code = 2


class LicenceNotAccepted(WrongUse):
    """A download needs `--accept-license` first."""


class ProofFailed(BuildError):
    """The artefact differs from the reference by more than its limit; it was not written to its final name."""

    exit_code = 1


class PlanRefused(BuildError):
    """A plan is truncated, of another key, unsigned where a key is configured, or not of the precision asked for."""

    exit_code = 1


class Missing(BuildError):
    """Something needed is not on this host."""

    exit_code = 3


class PlanNotFound(Missing):
    """No plan of this key in the cache or the store, and building was switched off or impossible."""


class StoreUnreachable(Missing):
    """The plan store did not answer, refused the credentials, or has no such bucket."""


class ServerFailed(Missing):
    """tritonserver did not start, or did not become ready in time."""
