"""Recipes: JSON that reproduces a variant from the same serving ONNX, without faces or a search."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.imports.proof import OnCount
from arcface_build.variants.calibrate import clipped_shares
from arcface_build.variants.int8 import quantizable_layers, quantize_convolutions
from arcface_build.variants.typed import rounded_as_float16, to_float16
from arcface_clients.errors import Missing, WrongUse

if TYPE_CHECKING:
    import onnx

FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """What to do to which serving ONNX.

    Attributes:
        precision: fp16 or int8.
        target: cpu or tensorrt.
        serving_sha256: the serving ONNX that it was made for.
        keep: names of the nodes that stay in higher precision.
        ranges: int8 only: [low, high] of each convolution input, for each target; all from one calibration.
        calibration: the faces: origin, count, digest.
        search: what the search measured, if there was one.
    """

    precision: str
    target: str
    serving_sha256: str
    keep: tuple[str, ...] = ()
    ranges: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    search: dict[str, Any] | None = None

    def apply(self, serving: onnx.ModelProto) -> onnx.ModelProto:
        """The variant; the same bytes each time."""
        if self.precision == "int8":
            return quantize_convolutions(serving, self.ranges[self.target], self.target, self.keep)
        return to_float16(serving, self.keep)

    def stand_in(self, serving: onnx.ModelProto) -> onnx.ModelProto:
        """The model to judge: for fp16 one that rounds as a GPU would, else the variant itself."""
        return rounded_as_float16(serving, self.keep) if self.precision == "fp16" else self.apply(serving)

    def clipped(self, serving: onnx.ModelProto, faces: np.ndarray, progress: OnCount | None = None) -> dict[str, float]:
        """Share of each 8-bit tensor's values on these faces that its range cuts off; int8 only."""
        if self.precision != "int8":
            return {}
        quantized = set(quantizable_layers(serving)) - set(self.keep)
        read = {n.input[0] for n in serving.graph.node if n.name in quantized}
        ranges = {name: ends for name, ends in self.ranges[self.target].items() if name in read}
        return clipped_shares(serving, ranges, faces, progress) if ranges else {}

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return {"format": FORMAT, **asdict(self)}


def load_recipe(path: Path, precision: str, target: str, serving_sha256: str) -> Recipe:
    """A recipe from its own file or from a variant's sidecar, checked against the request.

    Raises:
        Missing: no such file.
        WrongUse: not a recipe, or one for another precision, target or serving ONNX.
    """
    if not path.is_file():
        raise Missing(f"no recipe at {path}: expected the .json that arcface quantize wrote beside a variant.")
    try:
        data = json.loads(path.read_text())
        data = data.get("recipe", data)
        if data.pop("format") != FORMAT:
            raise KeyError("format")
        data["keep"] = tuple(data["keep"])
        data["serving_sha256"] = str(data["serving_sha256"])
        data["ranges"] = {
            target: {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
            for target, ranges in data.get("ranges", {}).items()  # fp16 has none
        }
        recipe = Recipe(**data)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WrongUse(f"{path} is not a recipe of format {FORMAT} ({type(exc).__name__}: {exc}).") from exc
    if recipe.serving_sha256 != serving_sha256:
        raise WrongUse(
            f"{path} was made for another serving ONNX: expected {serving_sha256[:12]}…, got "
            f"{recipe.serving_sha256[:12]}…. Leave out --recipe to search again."
        )
    if recipe.precision != precision or (precision == "int8" and target not in recipe.ranges):
        raise WrongUse(
            f"{path} makes {recipe.precision} for {', '.join(recipe.ranges) or recipe.target}, "
            f"not {precision} for {target}."
        )
    return Recipe(**{**data, "target": target})
