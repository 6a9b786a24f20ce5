"""How faces reach a server: what a caller may ask for, and what was chosen, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CONTROL_TIMEOUT_S = 10.0  # for everything that is asked of a server but inference
SharedMemory = bool | Literal["auto", "system", "cuda"] | None
SHARED_MEMORY = (None, True, False, "auto", "system", "cuda")
_NAMES = {None: "the wire", "system": "system shared memory", "cuda": "CUDA shared memory"}


@dataclass(frozen=True)
class Way:
    """How faces reach the server, and why so. `memory`: "system", "cuda", or None for the wire."""

    memory: Literal["system", "cuda"] | None
    reason: str

    @property
    def shared_memory(self) -> bool:
        """Whether it is not the wire."""
        return self.memory is not None

    def __str__(self) -> str:
        """For a log line."""
        return f"{_NAMES[self.memory]}: {self.reason}"
