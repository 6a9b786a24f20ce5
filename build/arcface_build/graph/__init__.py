"""Transformations of ONNX graphs; each one reports whether it changed the model, and why.

They work in place where possible (an r100 has 250 MB of weights) and return the model to continue with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Step:
    """The result of a transformation: the `model` to continue with, whether it `changed`, and `why` (or why not)."""

    name: str
    model: onnx.ModelProto
    changed: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """The entry for the manifest: step, changed, why."""
        return {"step": self.name, "changed": self.changed, "why": self.why}
