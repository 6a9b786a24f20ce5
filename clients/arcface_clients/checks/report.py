"""The outcome of one check of this host or of a server."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check. status: ok, absent (fine, but some features are unavailable), problem (with its `fix`)."""

    name: str
    status: str
    found: str
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)
