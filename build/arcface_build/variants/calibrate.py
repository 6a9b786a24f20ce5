"""Calibration: finds for each convolution input the clipped range with the least quantisation error.

One pass serves both targets: uint8 with a zero point (on CPUs signed activations are ten times slower) and symmetric
int8 (TensorRT). Ranges are clipped where the squared error over the observed values is least; the methods of
onnxruntime.quantization (min/max, percentile, entropy) lose more, as docs/variants.md shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arcface_build.imports.proof import OnCount
from arcface_clients.engines.runtimes import OnnxSession, open_session

if TYPE_CHECKING:
    import onnx

BINS = 4096
BATCH = 8
_SHARES = np.concatenate([np.geomspace(0.05, 0.4, 12), np.linspace(0.42, 1, 30)])  # of the range seen
LEVELS = {"cpu": (0, 255), "tensorrt": (-127, 127)}


@dataclass(frozen=True)
class Histogram:
    """Histogram of one tensor: `counts` int64 (BINS,) over equal bins of [low, high]."""

    low: float
    high: float
    counts: np.ndarray

    def centres(self) -> np.ndarray:
        """The middle of each bin, float64 (BINS,)."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return (edges[1:] + edges[:-1]) / 2


def conv_inputs(model: onnx.ModelProto) -> list[str]:
    """Distinct names of all tensors read by a convolution with constant weights, in graph order."""
    constants = {i.name for i in model.graph.initializer}
    return list(dict.fromkeys(n.input[0] for n in model.graph.node if n.op_type == "Conv" and n.input[1] in constants))


def collect_histograms(
    model: onnx.ModelProto, tensors: Iterable[str], faces: np.ndarray, progress: OnCount | None = None
) -> dict[str, Histogram]:
    """Histograms of `tensors` over `faces` (uint8 (N,112,112,3) BGR); two passes: first the range, then the counts."""
    names = list(tensors)
    session = _session_with_outputs(model, names)
    batches = [faces[i : i + BATCH] for i in range(0, len(faces), BATCH)]
    total, done = 2 * len(batches), 0
    ends: dict[str, tuple[float, float]] = {name: (0.0, 0.0) for name in names}  # ranges always include 0
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    for counting in (False, True):
        for batch in batches:
            for name, value in zip(names, session.run(names, {session.get_inputs()[0].name: batch}), strict=True):
                low, high = ends[name]
                if counting:
                    index = (value.ravel() - np.float32(low)) * np.float32(BINS / max(high - low, 1e-12))
                    counts[name] += np.bincount(index.astype(np.int32).clip(0, BINS - 1), minlength=BINS)
                else:
                    ends[name] = min(low, float(value.min())), max(high, float(value.max()))
            done += 1
            if progress:
                progress(done, total)
    return {name: Histogram(*ends[name], counts[name]) for name in names}


def clipped_shares(
    model: onnx.ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    faces: np.ndarray,
    progress: OnCount | None = None,
) -> dict[str, float]:
    """The share (0..1) of each tensor's values over these faces that its range cuts off."""
    names = list(ranges)
    session = _session_with_outputs(model, names)
    cut, seen = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for start in range(0, len(faces), BATCH):
        batch = faces[start : start + BATCH]
        for name, value in zip(names, session.run(names, {session.get_inputs()[0].name: batch}), strict=True):
            low, high = ranges[name]
            cut[name] += int(np.count_nonzero(value < low) + np.count_nonzero(value > high))
            seen[name] += value.size
        if progress:
            progress(min(start + BATCH, len(faces)), len(faces))
    return {name: cut[name] / seen[name] for name in names}


def least_error_range(histogram: Histogram, target: str) -> tuple[float, float]:
    """The range [low, high] whose 8-bit grid has the least squared error over the histogram; it always includes 0.

    Args:
        histogram: values seen.
        target: "cpu" (256 levels, any zero point) or "tensorrt" (255 levels around 0).
    """
    seen = histogram.counts > 0
    values, counts = histogram.centres()[seen], histogram.counts[seen].astype(np.float64)
    bound = max(-histogram.low, histogram.high)
    if bound <= 0:  # the tensor is zero everywhere
        return -1.0, 1.0

    def error(low: float, high: float) -> float:
        return float(counts @ np.square(values - on_grid(values, low, high, target)))

    if target == "tensorrt":
        best = min(_SHARES * bound, key=lambda end: error(-end, end))
        return -float(best), float(best)
    low, high = histogram.low, histogram.high
    for _ in range(2):  # one end at a time: the ends hardly depend on each other
        if histogram.low < 0:
            low = float(min(_SHARES * histogram.low, key=lambda end: error(end, high)))
        if histogram.high > 0:
            high = float(min(_SHARES * histogram.high, key=lambda end: error(low, end)))
    return low, high


def on_grid(values: np.ndarray, low: float, high: float, target: str) -> np.ndarray:
    """`values` quantised to the 8-bit grid of [low, high] and back (ONNX QuantizeLinear, DequantizeLinear)."""
    lowest, highest = LEVELS[target]
    scale = (high - low) / (highest - lowest)
    zero = 0 if target == "tensorrt" else round(lowest - low / scale)
    return (np.clip(np.rint(values / scale) + zero, lowest, highest) - zero) * scale


def _session_with_outputs(model: onnx.ModelProto, names: list[str]) -> OnnxSession:
    import onnx

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    have = {o.name for o in watched.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    return open_session(watched)
