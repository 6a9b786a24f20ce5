"""The pages of measured figures: each figure is the one its key names in its report; none is typed by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcface_clients.errors import Missing
from arcface_tools.measured_table import MEASURED, figure_text, key_text, page, read_row, sections, stale_pages
from conftest import REPO

ROWS: list[dict[str, Any]] = [
    row for section in yaml.safe_load((MEASURED / "rows.yaml").read_text()) for row in section["rows"]
]
IDS = [row["report"] + ": " + row["what"][:40] for row in ROWS]
WITHOUT_HOST: set[str] = set()


def test_the_pages_are_what_the_reports_say_today() -> None:
    stale = [str(path.relative_to(REPO)) for path in stale_pages()]
    assert not stale, f"{stale}: run python -m arcface_tools measured-table"


def test_a_page_that_somebody_edited_by_hand_is_found(tmp_path: Path) -> None:
    shutil.copytree(MEASURED, tmp_path / "docs" / "measured")
    readme = tmp_path / "README.md"
    text = (REPO / "README.md").read_text()
    readme.write_text(re.sub(r"\d\.\d\d \(", "9.99 (", text, count=1))
    assert set(stale_pages(tmp_path)) == {readme}


def test_a_report_that_was_measured_again_makes_the_pages_stale(tmp_path: Path) -> None:
    measured = shutil.copytree(MEASURED, tmp_path / "docs" / "measured")
    shutil.copyfile(REPO / "README.md", tmp_path / "README.md")
    report = json.loads((measured / "restarts.json").read_text())
    (measured / "restarts.json").write_text(json.dumps({**report, "wrong": 3}))
    stale = stale_pages(tmp_path)
    assert set(stale) == {measured / "README.md", tmp_path / "README.md"}
    assert all("3 wrong" in text for text in stale.values())


def test_readme_shows_six_rows() -> None:
    assert sum(row.in_readme for _, rows in sections() for row in rows) == 6


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_no_figure_of_a_row_is_typed_by_hand(row: dict[str, Any]) -> None:
    words = re.sub(r"\{\w+\}|`[^`]*`|\b1/", "", row["says"])
    assert not re.findall(r"(?<!\w)\d[\d.,]*", words)
    assert set(re.findall(r"\{(\w+)\}", row["what"] + row["says"])) == set(row["figures"])


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_the_command_of_a_row_exists(row: dict[str, Any]) -> None:
    program, first = row["command"].split()[:2]
    if program == "python":
        module = row["command"].split()[2].replace(".", "/")
        assert any((REPO / "tools" / file).exists() for file in (f"{module}.py", f"{module}/__main__.py"))
    elif program == "arcface":
        from arcface_build.cli import COMMANDS

        assert first in COMMANDS
    else:
        assert (REPO / program).exists()


@pytest.mark.parametrize("report", sorted({row["report"] for row in ROWS} - WITHOUT_HOST))
def test_a_report_says_where_it_was_measured(report: str) -> None:
    data = json.loads((MEASURED / f"{report}.json").read_text())
    assert data.get("cpu") or data["host"]["cpu"]


def test_every_report_is_named_by_a_page() -> None:
    pages = "".join(path.read_text() for path in (REPO / "docs").rglob("*.md"))
    assert not [path.name for path in MEASURED.glob("*.json") if f"{path.stem}" not in pages]


def int8_row(variant: dict[str, Any]) -> str:
    """A row of docs/variants.md's table of int8, from the report: figures of the worse runtime."""
    runs = variant["runtimes"]
    searched = max(run["searched"]["max_drift"] for run in runs)
    held_back = max(run["held_back"]["max_drift"] for run in runs)
    refused = "" if variant["passed"] else ": refused for its accuracy"
    fp32, int8 = runs[0]["accuracy_fp32"], min(run["accuracy"] for run in runs)
    cells = [
        f"{variant['before_search']['max_drift']:.4f}",
        f"{searched:.4f} / {held_back:.4f}{refused}",
        f"{variant['layers_kept']} of {variant['layers']}",
        f"{variant['clipped_worst']:.3%}".replace("%", " %"),
        f"{fp32:.2%} → {int8:.2%}".replace("%", " %"),
        f"{variant['cpu_s']:.0f} s",
    ]
    return " | ".join(cells)


def test_the_table_of_int8_variants_is_what_the_report_says() -> None:
    report = json.loads((MEASURED / "held-back.json").read_text())
    page = (REPO / "docs" / "variants.md").read_text()
    assert not [row for row in map(int8_row, report["variants"]) if f"| {row} |" not in page]


REPORT = {
    "ratios": [
        {"variant": "ours", "base": "bare", "median": 1.0183, "low": 0.9912, "high": 1.0601},
        {"variant": "ours", "base": "theirs", "median": 2.0, "low": 1.9, "high": 2.1},
    ],
    "share": 0.005,
    "again": 0.005,
    "rounds": [1, 2, 7],
}


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        ({"key": ["ratios", {"variant": "ours", "base": "bare"}]}, "1.02 (0.99–1.06)"),
        ({"key": ["ratios", {"base": "theirs"}, "median"], "as": "{:.1f} ×"}, "2.0 ×"),
        ({"key": ["share"], "as": "{:.1f} %", "times": 100}, "0.5 %"),
        ({"key": ["share"], "as": "1/{:.0f}", "inverse": True}, "1/200"),
        ({"key": ["rounds", -1], "as": "{}"}, "7"),
    ],
)
def test_a_figure_is_printed_by_its_format(figure: dict[str, Any], text: str) -> None:
    assert figure_text(REPORT, figure) == text


def test_a_figure_follows_its_own_key_and_no_other() -> None:
    figure = {"key": ["share"], "as": "{:.3f}"}
    assert figure_text({**REPORT, "again": 0.006}, figure) == "0.005"
    assert figure_text({**REPORT, "share": 0.006}, figure) == "0.006"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (["ratios", {"base": "nobody"}, "median"], "0 entries, expected one, for [nobody] of ratios[nobody].median"),
        (["ratios", {"variant": "ours"}], "2 entries, expected one"),
        (["ratio"], "no 'ratio' in ratio"),
        (["rounds", 3], "no 3 in rounds[3]"),
        (["share", "median"], "no 'median' in share.median"),
    ],
)
def test_a_key_that_the_report_lacks_is_refused_with_its_row(key: list[Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(REPORT))
    row = {
        "what": "a row",
        "says": "{x}",
        "command": "c",
        "report": "small",
        "figures": {"x": {"key": key, "as": "{}"}},
    }
    with pytest.raises(Missing, match=r"small\.json lacks 'x' of the row 'a row'") as caught:
        read_row(row, tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_line_of_the_page_names_its_command_its_report_and_every_key(row: dict[str, Any]) -> None:
    what = read_row(row).what
    line = next(line for line in page().splitlines() if line.startswith(f"| {what} |"))
    assert f"`{row['command']}`" in line
    for figure in row["figures"].values():
        report = figure.get("report", row["report"])
        assert f"[{report}]({report}.json)" in line
        assert f"`{key_text(figure['key'])}`" in line
