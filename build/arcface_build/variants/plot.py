"""Plots a search: drift against the number of layers kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from arcface_build.variants.search import SearchResult
from arcface_clients.atomic import new_file


def draw_search(
    path: Path, title: str, result: SearchResult, sensitivity: Mapping[str, float], limit: float, always: Sequence[str]
) -> None:
    """Write a PNG: drift of each set tried, the predicted drift, the limit, and each layer's share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
    scale = result.attempts[-1].max_drift / max(
        _left(result, sensitivity)[result.attempts[-1].kept - len(always)], 1e-12
    )
    kept = range(len(always), len(always) + len(result.order) + 1)
    upper.plot(kept, [scale * rest for rest in _left(result, sensitivity)], color="0.6", label="predicted")
    for passed, color, label in ((False, "tab:red", "refused"), (True, "tab:green", "passed")):
        points = [a for a in result.attempts if a.passed is passed]
        upper.plot(
            [a.kept for a in points],
            [a.max_drift for a in points],
            "o",
            color=color,
            label=f"{label}: worst face",
        )
        upper.plot([a.kept for a in points], [a.mean_drift for a in points], "_", color=color, label=f"{label}: mean")
    upper.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"limit {limit:g}")
    upper.set(title=title, xlabel="layers kept in higher precision", ylabel="drift (1 − cosine)", yscale="log")
    upper.set_ylim(bottom=limit / 30)
    upper.legend(fontsize="small")
    chosen = set(result.keep or ())
    names = list(sensitivity)
    lower.bar(
        range(len(names)),
        [sensitivity[n] for n in names],
        color=["tab:orange" if n in chosen else "tab:blue" for n in names],
    )
    lower.set(xlabel="layers in graph order (orange: kept)", ylabel="drift of it alone")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _left(result: SearchResult, sensitivity: Mapping[str, float]) -> list[float]:
    return [sum(sensitivity[name] for name in result.order[k:]) for k in range(len(result.order) + 1)]
