"""What `arcface serve` is asked for, and who is told what happens; nothing here knows a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from arcface_build.serving.choose import BackendChoice
from arcface_build.serving.exposure import Exposure
from arcface_build.serving.ports import Ports
from arcface_build.serving.process import EXIT_TIMEOUT_S, TritonProcess
from arcface_clients.checks.parity import ParityReport


@dataclass(frozen=True)
class ServeRequest:
    """What to serve and where; the options of `arcface serve`."""

    repository: Path
    models_dir: Path
    faces_bgr_u8: npt.NDArray[Any]  # uint8 (N,112,112,3), N ≥ 1: what a server is proved with
    backend: str = "auto"
    variant: str = "auto"  # auto: the fastest; installed: what is there; or a precision
    remeasure: bool = False
    exposure: Exposure = field(default_factory=Exposure)
    ports: Ports = field(default_factory=Ports)
    demo: bool = True
    reference: bool = True
    once: bool = False
    ready_timeout_s: float = 300.0
    exit_timeout_s: float = EXIT_TIMEOUT_S
    extra: Sequence[str] = ()  # further arguments for tritonserver


class Audience(Protocol):
    """Who is told what happens."""

    def notice(self, text: str) -> None:
        """Something that need not be known."""

    def warned(self, text: str) -> None:
        """Something that whoever serves has to know."""

    def chosen(self, line: str) -> None:
        """What will serve, and why; a line."""

    def proved(self, server: TritonProcess, choice: BackendChoice, report: ParityReport, with_reference: bool) -> None:
        """Every loaded backend beside the reference."""

    def failed(self, why: str, instead: str | None) -> None:
        """A backend did not load, or did not pass its gate; `instead` is tried next, None: nothing is left."""

    def serving(self, server: TritonProcess) -> None:
        """From now on it serves, until it is interrupted."""

    def importing(self) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """Entered for an import; gives where its progress is told: (phase, done, total)."""
