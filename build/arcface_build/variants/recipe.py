"""Recipes: JSON that reproduces a variant from the same serving ONNX, without faces or a search."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcface_build.graph.fold_constants import fold_constants
from arcface_build.graph.tensorrt_form import TensorRtForm, with_made
from arcface_build.graph.upgrade_opset import upgrade_opset
from arcface_build.imports.proof import OnCount
from arcface_build.variants.calibrate import clipped_shares
from arcface_build.variants.int8 import quantizable_layers, quantize_convolutions
from arcface_build.variants.typed import rounded_as_float16, to_float16
from arcface_clients.errors import Missing, WrongUse

if TYPE_CHECKING:
    import onnx

FORMAT = 1
_OPSET_OF_FLOAT16_SCALES = 19  # QuantizeLinear, DequantizeLinear


@dataclass(frozen=True)
class Recipe:
    """What to do to which serving ONNX.

    Attributes:
        precision: fp16 or int8.
        target: cpu or tensorrt.
        serving_sha256: the serving ONNX that it was made for.
        keep: names of the nodes that stay in higher precision: of fp16 in float32; of int8 for TensorRT in float16,
            for a CPU in float32.
        keep_fp32: int8 for TensorRT only: names of the nodes that would overflow in float16.
        form: how the graph was rewritten for TensorRT before anything else; None: not.
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
    keep_fp32: tuple[str, ...] = ()
    form: TensorRtForm | None = None

    def apply(self, serving: onnx.ModelProto) -> onnx.ModelProto:
        """The variant; the same bytes each time."""
        made = self._typed(serving)
        return self.form.label(made) if self.form else made

    def _typed(self, serving: onnx.ModelProto) -> onnx.ModelProto:
        model, keep = self._formed(serving)
        if self.precision == "fp16":
            return to_float16(model, keep)
        if self.target == "cpu":
            return quantize_convolutions(model, self.ranges[self.target], self.target, keep)
        newer = fold_constants(upgrade_opset(_copied(model), _OPSET_OF_FLOAT16_SCALES).model).model
        typed = quantize_convolutions(newer, self.ranges[self.target], self.target, keep)
        return to_float16(typed, with_made(typed, self.keep_fp32))

    def stand_in(self, serving: onnx.ModelProto) -> onnx.ModelProto:
        """The model to judge: one that rounds as a GPU would if the variant has float16 in it, else the variant."""
        if self.target == "cpu":
            return self.apply(serving)
        model, keep = self._formed(serving)
        if self.precision == "fp16":
            return rounded_as_float16(model, keep)
        typed = quantize_convolutions(model, self.ranges[self.target], self.target, keep)
        return rounded_as_float16(typed, with_made(typed, self.keep_fp32))

    def formed(self, serving: onnx.ModelProto) -> onnx.ModelProto:
        """The graph in the form for TensorRT, if the recipe names one; quantised convolutions keep their inputs."""
        if self.form is None:
            return serving
        model = _copied(serving)
        self.form.steps(model, spare=self._quantized(serving))
        return model

    def _formed(self, serving: onnx.ModelProto) -> tuple[onnx.ModelProto, set[str]]:
        """The graph in its form, and what to keep of it."""
        return (model := self.formed(serving)), with_made(model, self.keep) if self.form else set(self.keep)

    def _quantized(self, serving: onnx.ModelProto) -> set[str]:
        return set(quantizable_layers(serving)) - set(self.keep) if self.precision == "int8" else set()

    def clipped(self, serving: onnx.ModelProto, faces: np.ndarray, progress: OnCount | None = None) -> dict[str, float]:
        """Share of each 8-bit tensor's values on these faces that its range cuts off; int8 only."""
        if self.precision != "int8":
            return {}
        quantized = self._quantized(serving)
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
        data["keep"], data["keep_fp32"] = tuple(data["keep"]), tuple(data.get("keep_fp32", ()))
        data["form"] = TensorRtForm(**data["form"]) if data.get("form") else None
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
    elsewhere = target != data["target"]
    form = (TensorRtForm() if target == "tensorrt" else None) if elsewhere else recipe.form
    return Recipe(**{**data, "target": target, "form": form})


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy
