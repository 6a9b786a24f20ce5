"""Compares two ONNX files layer by layer, to find the first layer whose output differs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.compare.runs import run_all, session_runner, tensorrt_runner, tensors_in_order
from arcface_clients.errors import WrongUse

FACES = 2  # all activations of all layers are in memory at once


@dataclass(frozen=True)
class LayerError:
    """A tensor that both graphs compute; `relative` is the L2 norm of the difference over that of A's tensor."""

    tensor: str
    operator: str
    relative: float


@dataclass(frozen=True)
class LayerReport:
    """All shared tensors in A's order; `first` is the first above `tolerance`, `jump` where it grows most."""

    layers: tuple[LayerError, ...]
    tolerance: float
    first: LayerError | None
    jump: LayerError | None
    only_in_a: int
    only_in_b: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names as keys."""
        return asdict(self)

    def __str__(self) -> str:
        """In words."""
        shared = f"{len(self.layers)} layers compared"
        if self.first is None:
            worst = max(self.layers, key=lambda layer: layer.relative)
            return f"{shared}: none differs by more than {self.tolerance:g} (largest: {_told(worst)})"
        jump = f"; the error grows most at {_told(self.jump)}" if self.jump and self.jump != self.first else ""
        return f"{shared}: the first that differs is {_told(self.first)}, allowed {self.tolerance:g}{jump}"


def compare_layers(
    a: Path, b: Path, faces_bgr_u8: np.ndarray, tolerance: float = 1e-3, b_on_tensorrt: bool = False
) -> LayerReport:
    """Run both graphs with all shared tensors as outputs, and compare those in A's order.

    Args:
        a: serving ONNX.
        b: another one from the same source, or the same file with `b_on_tensorrt`.
        faces_bgr_u8: faces; only the first two are used.
        tolerance: relative error (L2) up to which a layer counts as equal.
        b_on_tensorrt: build B with TensorRT instead of running it on ONNX Runtime.

    Raises:
        WrongUse: the graphs share no tensor names.
        Missing: TensorRT is needed but not installed.
    """
    import onnx

    graphs = [tensors_in_order(onnx.load(str(path), load_external_data=False)) for path in (a, b)]
    shared = [name for name in graphs[0] if name in graphs[1]]
    if not shared:
        raise WrongUse(
            f"{a} and {b} share no tensor names, so their layers cannot be matched. "
            "Compare files made from the same source: models/NAME/serving.onnx and models/NAME/variants/*.onnx"
        )
    batch = faces_bgr_u8[:FACES]
    runner_b = tensorrt_runner(b, shared, len(batch)) if b_on_tensorrt else session_runner(b, shared)
    runner_a = session_runner(a, shared)
    runner_a.name, runner_b.name = "A", "B"
    (outputs_a,), (outputs_b,) = run_all([runner_a, runner_b], [batch])
    layers = [
        LayerError(name, graphs[0][name], error)
        for name in shared
        if (error := _relative(outputs_a[name], outputs_b[name])) is not None
    ]
    first = next((layer for layer in layers if not layer.relative <= tolerance), None)
    jump = max(
        ((after.relative - before.relative, after) for before, after in pairwise(layers)),
        key=lambda pair: pair[0],
        default=(0.0, None),
    )[1]
    absent = [sum(name not in other for name in graph) for graph, other in (graphs, graphs[::-1])]
    return LayerReport(tuple(layers), tolerance, first, jump if first else None, *absent)


def _relative(a: np.ndarray, b: np.ndarray) -> float | None:
    """Relative L2 error; None unless both are float tensors of the same shape."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind != "f" or b.dtype.kind != "f" or a.shape != b.shape or not a.size:
        return None
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-12))


def _told(layer: LayerError) -> str:
    return f"{layer.tensor} ({layer.operator}, relative error {layer.relative:.1e})"
