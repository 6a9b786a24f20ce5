"""Whether faces reach the server through shared memory: what a caller may ask for, and what was chosen and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arcface_clients.errors import ConfigError

SharedMemoryOption = bool | Literal["auto", "system", "cuda"] | None
"""What a caller may ask for; `ClientOptions` says what each means."""
Kind = Literal["system", "cuda"]
"""A kind of shared memory, as Triton names it."""
_TEXTS: dict[str, SharedMemoryOption] = {
    "auto": "auto",
    "system": "system",
    "cuda": "cuda",
    "true": True,
    "false": False,
    "none": None,
}
_NAMES = {None: "the wire", "system": "system shared memory", "cuda": "CUDA shared memory"}


@dataclass(frozen=True)
class SharedMemory:
    """What is used, and why. `kind`: "system", "cuda", or None where faces go over the wire."""

    kind: Kind | None
    reason: str

    def __str__(self) -> str:
        """For a log line."""
        return f"{_NAMES[self.kind]}: {self.reason}"


def shared_memory_option(value: object) -> SharedMemoryOption:
    """The option that a value means; as text, which environment variables are, it may be in capitals.

    Raises:
        ConfigError: there is no such option.
    """
    text = str(value).lower()
    if not isinstance(value, bool | str | None) or text not in _TEXTS:
        raise ConfigError(
            f"shared_memory is {value!r}; expected auto, system, cuda, true or false.", key="shared_memory"
        )
    return _TEXTS[text]
