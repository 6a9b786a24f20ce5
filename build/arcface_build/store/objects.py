"""The protocol of an object store: objects by name, never visible half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

Progress = Callable[[int], None]
"""Called with the number of bytes moved since the last call."""


class Stored(NamedTuple):
    """One object as `stored` reports it: its name, size, and when it was written (seconds since 1970)."""

    name: str
    size_bytes: int
    modified_s: float


class ObjectStore(Protocol):
    """Objects by name; a name is a relative path with `/`. Every method may raise StoreUnreachable."""

    url: str

    def stored(self, prefix: str = "") -> list[Stored]:
        """Objects whose names begin with `prefix`, sorted by name."""

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """The first `limit_bytes` of an object, or None if it does not exist."""

    def download(self, name: str, file: Path, progress: Progress | None = None) -> bool:
        """Write an object into `file` (the caller's temporary file); False if it does not exist."""

    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        """Store a file under a name; readers see the old object or the new one, never a part."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a small object; returns False and changes nothing if one of this name exists."""

    def delete(self, name: str) -> None:
        """Remove an object; a missing one is no error."""
