"""Renders a matrix of backends, precisions and batch sizes as text."""

from __future__ import annotations

from typing import Any


def matrix_text(report: dict[str, Any]) -> str:
    """The matrix as text."""
    width = max(len(row["backend"]) for row in report["rows"])
    lines = [
        f"{report['faces']} faces against {report['reference']}",
        f"{'backend':{width}}  precision  batch  mean cosine   min cosine   row alone   changed  gate",
    ]
    for row in report["rows"]:
        changed = "—" if row["changed"] is None else f"{row['changed']}/{report['pairs']}"
        verdict = "passed" if row["passed"] else f"FAILED (drift ≤ {row['max_drift']:g})"
        lines.append(
            f"{row['backend']:{width}}  {row['precision']:9}  {row['batch']:5}  {row['mean_cosine']:.9f}  "
            f"{row['min_cosine']:.9f}  {row['batch_difference']:.1e}  {changed:>9}  {verdict}"
        )
    return "\n".join(lines)
