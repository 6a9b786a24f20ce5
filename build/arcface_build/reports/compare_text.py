"""Renders a comparison of two sides as text."""

from __future__ import annotations

from typing import Any


def compare_text(report: dict[str, Any]) -> str:
    """The report as text."""
    drift, gate = report["drift"], report["gate"]
    lines = [
        f"A  {report['a']['label']} ({report['a']['precision']})",
        f"B  {report['b']['label']} ({report['b']['precision']})",
        f"{report['faces']} faces: cosine mean {drift['mean_cosine']:.7f}, min {drift['min_cosine']:.7f}; "
        f"L2 mean {drift['mean_l2']:.2e}, max {drift['max_l2']:.2e}",
        f"gate        {'passed' if gate['passed'] else 'FAILED'}: drift {drift['max_drift']:.2e}, "
        f"allowed {gate['max_drift']:g}",
    ]
    lines += [
        f"{row['figure']:<12}{row['status']}: {row['value']:.6f} (target {row['target']:g}, warning {row['warn']:g})"
        for row in report["targets"]
    ]
    if drift["bad_rows"]:
        lines.append(f"bad rows    {drift['bad_rows']} of B are zero or contain NaN")
    worst = [f"{w['name'] or w['index']} ({1 - w['cosine']:.1e})" for w in drift["worst_faces"][:3]]
    lines.append(f"worst       {', '.join(worst)}")
    if report["accuracy"]:
        lines += _accuracy_lines(report["accuracy"])
    lines += [f"finding     {finding['fault']}: {finding['sentence']}" for finding in report["findings"]]
    if report["not_explained"]:
        lines.append(f"explanation {report['not_explained']}")
    if report["layers"]:
        lines.append(f"layers      {report['layers']['told']}")
    return "\n".join(lines)


def _accuracy_lines(accuracy: dict[str, Any]) -> list[str]:
    lines = []
    for side in ("a", "b"):
        row = accuracy[side]
        tars = ", ".join(f"TAR@FAR {far} {100 * tar['value']:.2f} %" for far, tar in row["tar_at_far"].items())
        rank = f", rank-1 {100 * row['rank1']:.2f} %" if row["rank1"] is not None else ""
        lines.append(
            f"accuracy {side.upper()}  EER {100 * row['eer']['value']:.2f} % "
            f"({100 * row['eer']['low']:.2f}–{100 * row['eer']['high']:.2f}), "
            f"ten-fold {100 * row['fold_accuracy']:.2f} ± {100 * row['fold_standard_error']:.2f} %, {tars}{rank}"
        )
    changed = accuracy["changed"]
    lines.append(
        f"decisions   {changed['changed']} of {changed['pairs']} pairs change at cosine {changed['threshold']:.4f} "
        f"(accuracy {100 * changed['accuracy_reference']:.2f} → {100 * changed['accuracy_candidate']:.2f} %)"
    )
    return lines
