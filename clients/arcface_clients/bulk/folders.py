"""A folder whose files appear whole or not at all: what a job writes to, here on this host."""

from __future__ import annotations

import os
from pathlib import Path

from arcface_clients.atomic import new_file


class Folder:
    """A folder whose files appear whole or not at all. Names are relative and may hold slashes."""

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")

    def of(self, name: str) -> str:
        """The path or URL of a file in it."""
        return f"{self.path}/{name}"

    def names(self, below: str = "") -> dict[str, int]:
        """Names and sizes of the files directly in the folder `below`; nothing if there is none."""
        raise NotImplementedError

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is none."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        raise NotImplementedError

    def write(self, name: str, data: bytes) -> None:
        """Make or replace a file."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Remove a file; a missing one is no error."""
        raise NotImplementedError


class LocalFolder(Folder):
    """A folder of this host."""

    def names(self, below: str = "") -> dict[str, int]:
        """See `Folder`."""
        try:
            with os.scandir(self.of(below) if below else self.path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes | None:
        """See `Folder`."""
        try:
            return Path(self.of(name)).read_bytes()
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        """See `Folder`."""
        return Path(self.of(name)).is_file()

    def write(self, name: str, data: bytes) -> None:
        """See `Folder`."""
        with new_file(Path(self.of(name))) as temporary:
            temporary.write_bytes(data)

    def delete(self, name: str) -> None:
        """See `Folder`."""
        Path(self.of(name)).unlink(missing_ok=True)
