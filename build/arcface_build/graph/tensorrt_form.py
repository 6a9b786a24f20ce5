"""The form of a serving graph that TensorRT gets: which exact rewrites are made before it is typed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from arcface_build.graph import Step
from arcface_build.graph.fold_padded import fold_padded
from arcface_build.graph.prelu_as_relu import prelu_as_relu
from arcface_clients.errors import WrongUse

if TYPE_CHECKING:
    import onnx

PRELU_FORMS = ("as-is", "fused")


@dataclass(frozen=True)
class TensorRtForm:
    """fold_padded: no BatchNormalization before padded convolutions. prelu: "as-is", or "fused" for pointwise nodes."""

    fold_padded: bool = True
    prelu: str = "as-is"

    def __post_init__(self) -> None:
        """Refuse a form of PRelu that does not exist."""
        if self.prelu not in PRELU_FORMS:
            raise WrongUse(f"prelu is {self.prelu!r}: expected one of {', '.join(PRELU_FORMS)}.")

    def steps(self, model: onnx.ModelProto, spare: Collection[str] = ()) -> list[Step]:
        """Rewrite `model` in place, and say what each step did; convolutions named in `spare` keep their input."""
        steps = [fold_padded(model, spare)] if self.fold_padded else []
        return [*steps, prelu_as_relu(model)] if self.prelu == "fused" else steps

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


def with_made(model: onnx.ModelProto, names: Collection[str]) -> set[str]:
    """These nodes, and the nodes that the steps above made of them (called "NAME.map", "NAME.relu" …)."""
    return {*names, *(node.name for node in model.graph.node if node.name.rpartition(".")[0] in set(names))}
