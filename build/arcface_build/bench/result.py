"""Turns samples into the benchmark's JSON, and compares it with an older one.

The format is described in docs/reports.md. The ratios are the result; faces/s depend on the host and the day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcface_build.bench.interleaved import Sample, Spread, Variant, ratio, undisturbed_rounds
from arcface_build.bench.triton_statistics import ensemble_cost
from arcface_clients.errors import WrongUse

FORMAT = 1
DEFAULT_MARGIN = 0.03  # smaller differences between two runs on a shared machine are not significant


def summarise(
    variants: Sequence[Variant], samples: Mapping[str, Sequence[Sample]], host: Mapping[str, Any]
) -> dict[str, Any]:
    """The result as a JSON object: host, rounds, one row per variant, and the ratios between them."""
    rounds, disturbed = undisturbed_rounds(samples)
    return {
        "format": FORMAT,
        "kind": "bench",
        "host": dict(host),
        "rounds": {"measured": len(next(iter(samples.values()))), "kept": rounds, "disturbed": disturbed},
        "variants": [_row(v, [samples[v.name][r] for r in rounds]) for v in variants],
        "ratios": [
            {"variant": variant, "base": base, **ratio(samples, variant, base, rounds).to_json()}
            for variant, base in comparisons(variants)
        ],
    }


def comparisons(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """(variant, base) pairs to compute ratios for.

    Bases: the bare runtime at that batch, InsightFace b1, an ensemble's leaf, for served ones PyTorch at that batch.
    """
    pairs = []
    for variant in variants:
        for base in variants:
            if base is variant:
                continue
            same_batch = base.about.get("batch") == variant.about.get("batch")
            one_at_a_time = base.name == "insightface b1"
            leaf = (
                variant.about.get("model") == "arcface"
                and str(base.about.get("model", "")).startswith("arcface_")
                and all(variant.about[key] == base.about.get(key) for key in ("protocol", "batch", "concurrency"))
            )
            pytorch = base.name.startswith("pytorch") and variant.where == "server"
            if ((base.name.startswith("bare") or pytorch) and same_batch) or one_at_a_time or leaf:
                pairs.append((variant.name, base.name))
    return pairs


def read_result(path: Path) -> dict[str, Any]:
    """An older result, for `regressions`.

    Raises:
        WrongUse: the file is not a benchmark of this format.
    """
    expected = "expected what arcface bench --report FILE wrote"
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise WrongUse(f"{path} cannot be read as JSON ({exc}): {expected}.") from exc
    got = (result.get("format"), result.get("kind")) if isinstance(result, dict) else (None, None)
    if got != (FORMAT, "bench") or not isinstance(result.get("ratios"), list):
        raise WrongUse(f"{path} is not a benchmark of format {FORMAT}: format {got[0]}, kind {got[1]!r}; {expected}.")
    return result


def regressions(old: Mapping[str, Any], new: Mapping[str, Any], margin: float = DEFAULT_MARGIN) -> list[str]:
    """A sentence for each ratio that fell by more than `margin` (relative) beyond the larger of the two spreads.

    Raises:
        WrongUse: the two results share no ratio.
    """
    before = {(row["variant"], row["base"]): row for row in old["ratios"]}
    now = {(row["variant"], row["base"]): row for row in new["ratios"]}
    shared = [pair for pair in before if pair in now]
    if not shared:
        raise WrongUse(
            f"the two results share no ratio: expected some of {sorted(before)}, got {sorted(now)}. Repeat the options."
        )
    found = []
    for pair in shared:
        was, is_ = _spread(before[pair]), _spread(now[pair])
        allowed = margin * was.median + max(was.half_width, is_.half_width)
        if was.median - is_.median > allowed:
            found.append(
                f"{pair[0]} / {pair[1]}: {is_}, was {was}; fell by {was.median - is_.median:.3f}, allowed {allowed:.3f}"
            )
    return found


def _row(variant: Variant, samples: Sequence[Sample]) -> dict[str, Any]:
    latencies = [ms for sample in samples for ms in sample.latencies_ms]
    cpu = [s.cpu_ms_per_face for s in samples if s.cpu_ms_per_face is not None]
    return {
        "name": variant.name,
        "where": variant.where,
        **variant.about,
        "faces_per_s": Spread.of([s.faces_per_s for s in samples]).to_json(),
        "cpu_ms_per_face": Spread.of(cpu).to_json() if cpu else None,
        "latency_ms": {f"p{p}": float(np.percentile(latencies, p)) for p in (50, 90, 95, 99)} | {"max": max(latencies)}
        if latencies
        else None,
        "calls": len(latencies),
        "server": samples[-1].details.get("server"),
        "ensemble": _ensemble(variant, samples),
        "gpu": samples[-1].details.get("gpu"),  # None without a GPU
        "samples": [
            {"round": s.round_number, "faces_per_s": s.faces_per_s, "foreign_share": round(s.foreign_share, 4)}
            for s in samples
        ],
    }


def _ensemble(variant: Variant, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Spread over the samples of an ensemble's overhead over its model; None if it is not an ensemble."""
    model = str(variant.about.get("model"))
    costs = [cost for s in samples if (cost := ensemble_cost(s.details.get("server") or {}, model))]
    if not costs:
        return None
    figures = ("added_ms", "compute_ms", "share_of_compute")
    return {"over": costs[0]["over"]} | {key: Spread.of([cost[key] for cost in costs]).to_json() for key in figures}


def _spread(row: Mapping[str, Any]) -> Spread:
    return Spread(row["median"], row["low"], row["high"], row["count"])
