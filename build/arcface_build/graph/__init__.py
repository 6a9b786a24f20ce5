"""Graph steps: an ONNX model in, the same network in another form out, and whether and why it changed.

Steps work in place where they can (a r100 holds 250 MB of weights) and hand back the model to go on with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Step:
    """What a step made: `model` to go on with, `changed`, and `why` it did or did not change, in words."""

    name: str
    model: onnx.ModelProto
    changed: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """The step as it stands in a manifest: step, changed, why."""
        return {"step": self.name, "changed": self.changed, "why": self.why}
