"""Searches for the smallest set of layers that must stay in higher precision for a variant to pass its gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from arcface_build.variants.gate import VariantVerdict

if TYPE_CHECKING:
    import onnx

MAX_TRIES = 10
_AIM = 0.97  # of the limit: predictions aim slightly below it, so that the first hit rarely just fails


@dataclass(frozen=True)
class Attempt:
    """One set that was built and measured: number of layers kept, predicted drift, measured drift."""

    kept: int
    predicted_drift: float
    max_drift: float
    mean_drift: float
    passed: bool


@dataclass(frozen=True)
class SearchResult:
    """`keep` is None if even keeping every layer does not pass; `order` is the order in which layers are kept."""

    keep: tuple[str, ...] | None
    order: tuple[str, ...]
    attempts: tuple[Attempt, ...]

    def to_json(self) -> dict[str, Any]:
        """The record for a recipe."""
        return {"order": list(self.order), "attempts": [asdict(a) for a in self.attempts]}


def order_to_keep(sensitivity: Mapping[str, float], work: Mapping[str, float]) -> list[str]:
    """Layers by drift saved per multiplication that stays in higher precision, largest first.

    This is the greedy solution of a knapsack problem: plain drift would keep one stem convolution at the cost of six
    later ones.
    """
    return sorted(sensitivity, key=lambda name: -sensitivity[name] / work[name])


def smallest_passing_set(
    sensitivity: Mapping[str, float],
    work: Mapping[str, float],
    attempt: Callable[[Sequence[str]], VariantVerdict],
    always: Sequence[str] = (),
) -> SearchResult:
    """How many layers, in `order_to_keep`, must stay in higher precision for the variant to pass its gate.

    Errors of different layers are nearly independent, so their drifts add up: the sum over the layers not kept, times
    one measured scale factor, predicts the drift. The prediction chooses what to build next; only a variant that was
    built and passed counts.

    Args:
        sensitivity: layer → drift when it alone is coarse.
        work: layer → multiplications per face.
        attempt: builds and judges the variant that keeps the given layers.
        always: layers that are always kept.
    """
    order = [name for name in order_to_keep(sensitivity, work) if name not in always]
    left = [sum(sensitivity[name] for name in order[k:]) for k in range(len(order) + 1)]
    attempts: list[Attempt] = []
    fails, passes, guess, scale = -1, None, 0, 1.0
    while len(attempts) < MAX_TRIES:
        verdict = attempt([*always, *order[:guess]])
        drift = verdict.max_drift
        attempts.append(Attempt(len(always) + guess, scale * left[guess], drift, verdict.mean_drift, verdict.passed))
        if verdict.passed:
            passes = guess
        else:
            fails = guess
        if passes == fails + 1 or (passes is None and guess == len(order)):
            break
        if left[guess] > 0:
            scale = max(drift, 1e-12) / left[guess]
        wanted = next((k for k, rest in enumerate(left) if scale * rest <= _AIM * verdict.gate.limit), len(order))
        highest = len(order) if passes is None else passes - 1
        guess = min(max(wanted, fails + 1), highest)
    if passes is None:
        return SearchResult(None, tuple(order), tuple(attempts))
    return SearchResult((*always, *order[:passes]), tuple(order), tuple(attempts))


def layer_work(model: onnx.ModelProto) -> dict[str, float]:
    """Multiplications per face of each convolution, by node name."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.value_info}
    weights = {i.name: list(i.dims) for i in model.graph.initializer}
    work = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in weights:
            out_channels, *rest = weights[node.input[1]]
            pixels = 1
            for size in shapes.get(node.output[0], [0, 0, 1, 1])[2:]:
                pixels *= max(size, 1)
            kernel = 1
            for size in rest:
                kernel *= size
            work[node.name] = float(out_channels * kernel * pixels)
    return work
