"""Gives Triton paths without blanks and the like, by links to the real ones: it hands them unquoted to a shell."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path


class PlainPaths:
    """The links that one server needs; `remove` takes them away."""

    def __init__(self) -> None:
        self._links: tempfile.TemporaryDirectory[str] | None = None

    def of(self, path: Path | str, name: str) -> str:
        """The path itself, absolute, where a shell takes it as it is, else a link to it of this name."""
        if "://" in str(path):
            return str(path)
        path = Path(path).absolute()
        if shlex.quote(str(path)) == str(path):
            return str(path)
        self._links = self._links or tempfile.TemporaryDirectory(prefix="arcface-")
        link = Path(self._links.name) / name
        link.symlink_to(Path(path).resolve())
        return str(link)

    def remove(self) -> None:
        """Remove the links; what they lead to stays."""
        if self._links is not None:
            self._links.cleanup()
            self._links = None
