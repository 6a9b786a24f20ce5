"""README's table of measured figures: each stands in the report that its row names, rounded and not made up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import REPO

SPREAD = re.compile(r"(?P<median>\d+\.\d+)(?: ms| ×)? \((?P<low>\d+\.\d+)–(?P<high>\d+\.\d+)\)")
NUMBER = re.compile(r"(?<![\w.,/])(?P<inverse>1/)?(?P<number>\d[\d,]*(?:\.\d+)?)(?P<unit> %| µs)?")
NOT_FIGURES = ("samples", "samples_ms", "host", "server", "rounds")  # one sample of many is no figure of the report


def _rows() -> list[tuple[str, str, tuple[str, ...]]]:
    """(what, figures, reports) of README's table under Measured; `the same` is the report of the row before."""
    section = (REPO / "README.md").read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    rows: list[tuple[str, str, tuple[str, ...]]] = []
    for line in section.splitlines()[2:]:
        if line.startswith("|") and not line.startswith(("| what |", "|---")):
            what, figures, _, report = (cell.strip() for cell in line.strip("|").split(" | "))
            reports = tuple(re.findall(r"\]\(([^)]+)\)", report))
            rows.append((what, figures, reports if report != "the same" else rows[-1][2]))
    return rows


ROWS = _rows()


def _objects(data: Any) -> Iterator[dict[str, Any]]:
    """Every object of a report, outermost first."""
    if isinstance(data, dict):
        yield data
        for key, value in data.items():
            if key not in NOT_FIGURES:
                yield from _objects(value)
    elif isinstance(data, list):
        for value in data:
            yield from _objects(value)


def _numbers(data: Any) -> list[float]:
    """Every number of a report, and of each object the ratios between its numbers (memory of one way over another)."""
    found: list[float] = []
    for each in _objects(data):
        own = [float(v) for v in each.values() if isinstance(v, int | float) and not isinstance(v, bool)]
        found += own
        if len(own) == 2:
            found += [a / b for a, b in (own, own[::-1]) if b]
    return found


def _rounds_to(value: float, text: str) -> bool:
    decimals = len(text.partition(".")[2])
    return abs(value - float(text.replace(",", ""))) <= 0.5 * 10**-decimals * (1 + 1e-6)


def _absent(figures: str, reports: list[Any]) -> list[str]:
    """What the cell says and no report holds: spreads as a whole, then the numbers that are left."""
    figures = re.sub(r"`[^`]*`", "", figures)
    spreads = [each for report in reports for each in _objects(report) if {"median", "low", "high"} <= each.keys()]
    absent = [
        match[0]
        for match in SPREAD.finditer(figures)
        if not any(all(_rounds_to(each[key], text) for key, text in match.groupdict().items()) for each in spreads)
    ]
    numbers = [number for report in reports for number in _numbers(report)]
    for match in NUMBER.finditer(SPREAD.sub("", figures)):
        scale = {" %": 100, " µs": 1000, None: 1}[match["unit"]]  # reports hold shares and milliseconds
        values = [1 / n for n in numbers if n] if match["inverse"] else [scale * n for n in numbers]
        if not any(_rounds_to(value, match["number"]) for value in values):
            absent.append(match[0])
    return absent


def test_the_table_of_figures_is_found() -> None:
    assert len(ROWS) > 10


@pytest.mark.parametrize(("what", "figures", "reports"), ROWS, ids=[row[0][:60] for row in ROWS])
def test_each_figure_of_readme_stands_in_its_report(what: str, figures: str, reports: tuple[str, ...]) -> None:
    assert reports, f"{what}: names no report"
    assert not re.search(r"\b[A-Z]{4,}\b", re.sub(r"HTTP|JSON", "", figures)), f"a placeholder: {figures}"
    read = [json.loads((REPO / path).read_text()) for path in reports]
    for path, report in zip(reports, read, strict=True):
        assert report.get("cpu") or report["host"]["cpu"], f"{path} does not say where it was measured"
    if re.search(r"\d", figures):
        assert not (absent := _absent(figures, read)), f"{what}: {', '.join(reports)} holds no {', '.join(absent)}"
    else:
        assert all(report["wrong"] == 0 for report in read), what


@pytest.mark.parametrize(
    ("figures", "absent"),
    [
        ("1.02 (0.99–1.06) `a b1`, 3.80", []),
        ("1.02 × (0.99–1.06), r18 3.80", []),
        ("1.02 (0.99–1.07)", ["1.02 (0.99–1.07)"]),
        ("3.81", ["3.81"]),
        ("0.5 %, 52 µs, 1/339", []),
        ("0.6 %, 53 µs, 1/340", ["0.6 %", "53 µs", "1/340"]),
        ("1,000 faces", []),
        ("7", ["7"]),  # one sample of many
    ],
)
def test_a_figure_that_no_report_holds_is_found(figures: str, absent: list[str]) -> None:
    report = {
        "ratios": [{"median": 1.0183, "low": 0.9912, "high": 1.0601, "count": 3}],
        "mb": {"ours": 5.7739, "theirs": 1956.98},
        "rest": {"a": 3.799, "share": 0.005, "ms": 0.05188, "faces": 1000},
        "samples": [{"x": 7.0}],
    }
    assert _absent(figures, [report]) == absent
