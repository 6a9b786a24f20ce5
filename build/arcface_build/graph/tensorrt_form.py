"""The form of a serving graph that TensorRT gets: which exact rewrites are made before it is typed."""

from __future__ import annotations

import json
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
METADATA = "arcface.tensorrt_form"  # key of the file's metadata that says which form it is in


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

    def label(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Write into the file's metadata that it is in this form; returns the same model."""
        entry = next((item for item in model.metadata_props if item.key == METADATA), None)
        entry = entry or model.metadata_props.add(key=METADATA)
        entry.value = json.dumps(self.to_json(), sort_keys=True)
        return model

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)


UNTOUCHED = TensorRtForm(fold_padded=False)


def form_of(model: onnx.ModelProto) -> TensorRtForm:
    """The form that a file says it is in; without a label, that of an import."""
    text = next((item.value for item in model.metadata_props if item.key == METADATA), None)
    return UNTOUCHED if text is None else TensorRtForm(**json.loads(text))


def with_made(model: onnx.ModelProto, names: Collection[str]) -> set[str]:
    """These nodes, and the nodes that the steps above made of them (called "NAME.map", "NAME.relu" …)."""
    return {*names, *(node.name for node in model.graph.node if node.name.rpartition(".")[0] in set(names))}
