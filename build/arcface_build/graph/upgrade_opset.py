"""Upgrades a model to opset 17 or newer, and removes weights from its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arcface_build.errors import SourceRefused
from arcface_build.graph import Step
from arcface_build.graph.index import GraphIndex, drop_unused

if TYPE_CHECKING:
    import onnx

MIN_OPSET = 17


def upgrade_opset(model: onnx.ModelProto, minimum: int = MIN_OPSET) -> Step:
    """Convert an older model to opset `minimum` with onnx.version_converter; newer opsets are unchanged.

    Raises:
        SourceRefused: the converter has no rule for one of the nodes.
    """
    import onnx

    opset = opset_of(model)
    _only_fed_inputs(model.graph)
    _set_ir_version(model)  # before converting: below IR version 4 the converter requires weights to be inputs
    if opset >= minimum:
        return Step("upgrade_opset", model, False, f"opset {opset} is {minimum} or newer")
    try:
        model = onnx.version_converter.convert_version(model, minimum)
    except Exception as exc:  # C++ errors of the converter appear as RuntimeError, ValueError or its own class
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".!")
        raise SourceRefused(
            f"cannot convert opset {opset} to {minimum}: {reason}. Export the model again with opset {minimum}."
        ) from exc
    _only_fed_inputs(model.graph)
    _set_ir_version(model)
    return Step("upgrade_opset", model, True, f"opset {opset} → {minimum} by onnx.version_converter")


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operator set (0 if the file names none)."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _set_ir_version(model: onnx.ModelProto) -> None:
    """Set the oldest IR version that supports this opset: older runtimes would needlessly refuse a newer one."""
    import onnx

    standard = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    model.ir_version = max(8, onnx.helper.find_min_ir_version_for(standard, ignore_unknown=True))


def _only_fed_inputs(graph: onnx.GraphProto) -> None:
    """Remove weights from the inputs (IR version 3): runtimes do not treat those as constant and fold nothing."""
    weights = GraphIndex(graph).initializers
    for position in reversed(range(len(graph.input))):
        if graph.input[position].name in weights:
            del graph.input[position]
    drop_unused(graph)
