"""Renders the JSON of `arcface matrix` as an HTML page with a heat map."""

from __future__ import annotations

import math
from typing import Any

from arcface_build.reports.page import heat_map, page, paragraph, section, verdict


def matrix_page(report: dict[str, Any]) -> str:
    """One page: verdict, then drift, batch invariance and changed decisions by backend, precision and batch."""
    rows = report["rows"]
    failed = [row for row in rows if not row["passed"]]
    told = (
        f"{len(rows)} combinations within their limits"
        if not failed
        else f"{len(failed)} of {len(rows)} combinations exceed their limits: "
        + ", ".join(f"{row['backend']} {row['precision']} batch {row['batch']}" for row in failed)
    )
    blocks = [
        verdict(report["passed"], told),
        section(
            "Largest drift (1 − cosine)",
            paragraph("The darker, the closer to the limit of the precision.", "soft"),
            _map(rows, lambda row: (_short(1 - row["min_cosine"]), _heat(1 - row["min_cosine"], row["max_drift"]))),
        ),
        section("Mean cosine", _map(rows, lambda row: (f"{row['mean_cosine']:.7f}", None))),
        section(
            "Batch invariance: a face in a batch against the same face alone (1 − cosine)",
            _map(
                rows,
                lambda row: (
                    _short(row["batch_difference"]),
                    _heat(row["batch_difference"], row["batch_difference_allowed"]),
                ),
            ),
        ),
    ]
    if report["pairs"]:
        blocks.append(
            section(
                f"Changed decisions, of {report['pairs']} pairs at cosine {report['threshold']:.4f}",
                _map(rows, lambda row: (str(row["changed"]), 20 * row["changed"] / report["pairs"])),
            )
        )
    subtitle = f"{report['faces']} faces; contract {report['contract_id'] or 'unknown'}"
    return page(f"Parity matrix against {report['reference']}", subtitle, *blocks)


def _map(rows: list[dict[str, Any]], cell: Any) -> str:
    """Backends and precisions as rows, batch sizes as columns."""
    batches = sorted({row["batch"] for row in rows})
    sides = list(dict.fromkeys((row["backend"], row["precision"]) for row in rows))
    found = {(row["backend"], row["precision"], row["batch"]): row for row in rows}
    body = [
        (
            " ".join(dict.fromkeys(side)),
            [cell(found[key]) if (key := (*side, batch)) in found else ("—", None) for batch in batches],
        )
        for side in sides
    ]
    return heat_map(("batch size:", *(str(batch) for batch in batches)), body)


def _heat(value: float, limit: float) -> float:
    """0 at a millionth of the limit, 1 at the limit."""
    return 1 + math.log10(max(value, 1e-12) / limit) / 6


def _short(value: float) -> str:
    return "0" if value < 1e-15 else f"{value:.1e}".replace("e-0", "e-")
