"""The evidence for vectors runs, small, and its table holds what was measured."""

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
    assert all(way in printed for part in ("pairs_16", "square_1000", "nearest") for way in report[part]["ways"])
