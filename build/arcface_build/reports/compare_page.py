"""Renders the JSON of `arcface compare`, with the worst faces, as an HTML page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from arcface_build.reports.page import faces, figures, page, paragraph, picture, section, table, verdict
from arcface_build.reports.plots import Axis, Series, bars, lines

_KIND = {"met": "good", "missed": "note", "warning": "bad"}


def compare_page(report: dict[str, Any], pixels: np.ndarray | None) -> str:
    """One page: verdict, findings, drift with histogram, accuracy with ROC, worst faces, layers.

    Args:
        report: what `arcface compare --json` writes (docs/reports.md).
        pixels: the faces, uint8 (N,112,112,3) BGR, for the worst ones; None: without pictures.
    """
    drift, gate = report["drift"], report["gate"]
    blocks = [
        verdict(
            report["passed"],
            f"largest drift {drift['max_drift']:.2e}, allowed {gate['max_drift']:g} (1 − cosine per face)",
        ),
        *(
            [paragraph("A and B have different contracts: their embeddings must not be mixed.", "bad")]
            if report["across_contracts"]
            else []
        ),
        *(paragraph(f"{f['fault']}: {f['sentence']}", "bad") for f in report["findings"]),
        *([paragraph(report["not_explained"], "soft")] if report["not_explained"] else []),
        section("Drift", _figures_of(report), figures(_histogram(drift))),
    ]
    if report["accuracy"]:
        blocks.append(section("Recognition", *_accuracy(report["accuracy"])))
    if pixels is not None:
        blocks.append(section("Worst faces", faces(*(_face(w, pixels) for w in drift["worst_faces"]))))
    if report["layers"]:
        blocks.append(
            section("Layer by layer", paragraph(report["layers"]["told"]), figures(_layers(report["layers"])))
        )
    title = f"{report['b']['label']} against {report['a']['label']}"
    return page(title, f"{report['faces']} faces; contract {report['a']['contract_id'] or 'unknown'}", *blocks)


def _figures_of(report: dict[str, Any]) -> str:
    drift = report["drift"]
    rows = [
        (
            row["figure"].replace("_", " "),
            f"{row['value']:.6f}",
            f"{row['target']:g}",
            (row["status"], _KIND[row["status"]]),
        )
        for row in report["targets"]
    ]
    norms = drift["norms"]["candidate"]
    told = (
        f"Largest L2 distance {drift['max_l2']:.3g}; lengths of B {norms['min']:.4f}–{norms['max']:.4f}; "
        f"{drift['bad_rows']} rows zero or NaN. "
        + ", ".join(
            f"{p} % of the faces below cosine {value:.6f}" for p, value in drift["percentiles"].items() if p in "15"
        )
        + "."
    )
    return table(("figure", "value", "target", "status"), rows) + paragraph(told, "soft")


def _histogram(drift: dict[str, Any]) -> str:
    """Bars for the range of bins with faces; whole decades are labelled."""
    edges, counts = drift["histogram"]["edges"], drift["histogram"]["counts"]
    held = [i for i, count in enumerate(counts) if count]
    shown = range(max(0, held[0] - 3), min(len(counts), held[-1] + 4))
    labels = [_decade(edges[i]) for i in shown]
    return bars("Faces by drift", labels, [counts[i] for i in shown], "1 − cosine (left edge of a bar)", "faces")


def _decade(edge: float) -> str:
    if edge <= 0:
        return "0"
    exponent = math.log10(edge)
    return f"1e{round(exponent)}" if abs(exponent - round(exponent)) < 1e-6 else ""


def _accuracy(accuracy: dict[str, Any]) -> list[str]:
    rows = []
    for side in ("a", "b"):
        row = accuracy[side]
        rows.append(
            (
                side.upper(),
                _interval(row["eer"]),
                f"{100 * row['fold_accuracy']:.2f} ± {100 * row['fold_standard_error']:.2f}",
                *(_interval(tar) for tar in row["tar_at_far"].values()),
                f"{100 * row['rank1']:.2f}" if row["rank1"] is not None else "—",
            )
        )
    head = ("", "EER %", "ten-fold %", *(f"TAR % at FAR {far}" for far in accuracy["a"]["tar_at_far"]), "rank-1 %")
    changed = accuracy["changed"]
    told = (
        f"{changed['changed']} of {changed['pairs']} pairs are decided differently at cosine "
        f"{changed['threshold']:.4f}: accuracy {100 * changed['accuracy_reference']:.2f} % with A, "
        f"{100 * changed['accuracy_candidate']:.2f} % with B. Intervals are 95 %, people resampled."
    )
    least = 1 / accuracy["a"]["impostor"]
    curves = [
        Series(name, [max(v, least) for v in accuracy[side]["roc"]["far"]], accuracy[side]["roc"]["tar"])
        for side, name in (("a", "A"), ("b", "B"))
    ]
    low = min(0.9, *(y for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if x > least))
    roc = lines(
        "ROC: true-accept rate by false-accept rate",
        curves,
        Axis("false accepts", least, 1, log=True),
        Axis("true accepts", low, 1),
    )
    return [table(head, rows), paragraph(told), figures(roc)]


def _face(worst: dict[str, Any], pixels: np.ndarray) -> str:
    name = worst["name"] or f"face {worst['index']}"
    return picture(pixels[worst["index"]], f"{name}: 1 − cosine {1 - worst['cosine']:.1e}")


def _layers(layers: dict[str, Any]) -> str:
    errors = [max(layer["relative"], 1e-8) for layer in layers["layers"]]
    number = list(range(1, len(errors) + 1))
    return lines(
        "Relative error of each layer that both files have",
        [Series("B against A", number, errors), Series("tolerance", [1, len(errors)], [layers["tolerance"]] * 2)],
        Axis("layer, in the order of A", 1, max(len(errors), 2)),
        Axis("relative error", 1e-8, max(1.0, *errors), log=True),
    )


def _interval(value: dict[str, float]) -> str:
    return f"{100 * value['value']:.2f} ({100 * value['low']:.2f}–{100 * value['high']:.2f})"
