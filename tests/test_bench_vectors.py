"""The evidence for vectors runs, small, and its table says what was measured."""

from __future__ import annotations

import json

from arcface_tools.vectors import run, table


def test_vector_figures_are_measured_side_by_side() -> None:
    report = run(large=3000, gallery_size=2000, dim=64, rounds=1)
    assert json.loads(json.dumps(report)) == report
    assert report["square_1000"]["memory_mb"]["broadcast"] > 10 * report["square_1000"]["memory_mb"]["matrix product"]
    assert set(report["nearest"]["ratios"]) == {
        "nearest, among themselves / bare product",
        "nearest, against others / bare product",
        "pairs within a distance / bare product",
    }
    assert 20 < report["nearest"]["process_mb"] < 500
    printed = table(report)
    for line in ("16 faces, 120 distances (64-d)", "3,000 rows, top 10 (64-d)", "gallery of 2,000 (64-d)"):
        assert line in printed
