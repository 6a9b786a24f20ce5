"""Generates the pages of docs/measured/ and README's table of figures from the reports: no figure is typed by hand.

Run: python -m arcface_tools measured-table [--check]

docs/measured/rows.yaml says what each row is about, and where its figures are in which report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from arcface_clients.errors import Missing
from arcface_tools import bulk_paper

REPO = Path(__file__).resolve().parents[2]
MEASURED = REPO / "docs" / "measured"
SPREAD = "{median:.2f} ({low:.2f}–{high:.2f})"
BEGIN = "<!-- made by python -m arcface_tools measured-table from docs/measured/rows.yaml -->"
END = "<!-- end of what is made -->"
Step = str | int | Mapping[str, Any]

HEAD = """# What has been measured

{begin}

On 2 cores of an AMD EPYC (AVX512-VNNI, AVX512-BF16; where it says so, AVX2 alone), no GPU, the wheel's tritonserver
and our python-based backends. Ratios are medians of ratios measured in turns within one run, with the 10th and 90th
percentile in brackets; a figure without brackets is a single figure of its report. Drift is that of the worst face the
gate saw. The reports hold the rest: the host, every sample, the rounds that were dropped.

Each row names its command, its report, and the key of each figure in the order of the text. `ratios[A, B]` is the
entry of `ratios` with these names. To add a row, edit [rows.yaml](rows.yaml).

**Not measured:** anything on a GPU (`scripts/gpu-check` writes that report), the native backends of the NGC image,
more than two cores.
"""


@dataclass(frozen=True)
class Row:
    """One line of the table, ready to print: texts, and the (report, key) behind each figure."""

    what: str
    says: str
    command: str
    keys: tuple[tuple[str, str], ...]
    in_readme: bool


def value_at(data: Any, key: Sequence[Step]) -> Any:
    """The value of a report under a key; a mapping in the key selects the only list entry with these values."""
    for step in key:
        if isinstance(step, str | int):
            try:
                data = data[step]
            except (LookupError, TypeError):
                raise Missing(f"no {step!r} in {key_text(key)}") from None
        else:
            found = [entry for entry in data if all(entry.get(name) == value for name, value in step.items())]
            if len(found) != 1:
                raise Missing(f"{len(found)} entries, expected one, for {key_text([step])} of {key_text(key)}")
            data = found[0]
    return data


def key_text(key: Sequence[Step]) -> str:
    """The key in readable form: variants[arcface grpc b8 c2].gate.drift.max_drift."""
    parts = ""
    for step in key:
        if isinstance(step, str):
            parts += f".{step}"
        else:
            parts += f"[{', '.join(map(str, step.values())) if isinstance(step, Mapping) else step}]"
    return parts.removeprefix(".")


def figure_text(data: Any, figure: Mapping[str, Any]) -> str:
    """One figure as printed: looked up, scaled, rounded by its format."""
    value = value_at(data, figure["key"])
    if isinstance(value, Mapping):
        return str(figure.get("as", SPREAD)).format(**value)
    if figure.get("inverse"):
        value = 1 / value
    if "times" in figure:
        value *= figure["times"]
    return str(figure["as"]).format(value)


def read_row(raw: Mapping[str, Any], folder: Path = MEASURED) -> Row:
    """A row of rows.yaml with its figures filled in from the reports in `folder`."""
    texts, keys = {}, []
    for name, figure in raw["figures"].items():
        report = figure.get("report", raw["report"])
        try:
            texts[name] = figure_text(_report(folder / f"{report}.json"), figure)
        except Missing as exc:
            raise Missing(
                f"{report}.json lacks {name!r} of the row {raw['what']!r}: {exc}\n"
                "Next: fix the row in docs/measured/rows.yaml, or measure again with its command"
            ) from exc
        keys.append((report, key_text(figure["key"])))
    what, says = (raw[name].format(**texts) for name in ("what", "says"))
    return Row(what, says, raw["command"], tuple(keys), raw.get("readme", False))


def sections(folder: Path = MEASURED) -> list[tuple[str, list[Row]]]:
    """(title, rows) of rows.yaml in `folder`."""
    import yaml

    raw = yaml.safe_load((folder / "rows.yaml").read_text(encoding="utf-8"))
    return [(section["title"], [read_row(row, folder) for row in section["rows"]]) for section in raw]


def page(folder: Path = MEASURED) -> str:
    """The whole of docs/measured/README.md."""
    text = HEAD.format(begin=BEGIN)
    for title, rows in sections(folder):
        text += f"\n## {title}\n\n| what | figure | command | report and keys |\n|---|---|---|---|\n"
        for row in rows:
            text += f"| {row.what} | {row.says} | `{row.command}` | {_where(row)} |\n"
    return text


def readme_table(folder: Path = MEASURED) -> str:
    """The rows that README shows, between its two markers."""
    lines = [BEGIN, "", "| what | figure | report |", "|---|---|---|"]
    for _, rows in sections(folder):
        for row in filter(lambda row: row.in_readme, rows):
            reports = ", ".join(
                f"[{name}](docs/measured/{name}.json)" for name in dict.fromkeys(n for n, _ in row.keys)
            )
            lines.append(f"| {row.what} | {row.says} | {reports} |")
    return "\n".join([*lines, "", END])


def readme_with(table: str, readme: str) -> str:
    """README's text with the table between its markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise Missing(f"README.md lacks the markers of its table.\nNext: put back {BEGIN} and {END}")
    return before + table + after


def stale_pages(repo: Path = REPO) -> dict[Path, str]:
    """The pages that do not match the reports: path -> expected content."""
    readme, measured = repo / "README.md", repo / "docs" / "measured"
    wanted = {
        measured / "README.md": page(measured),
        readme: readme_with(readme_table(measured), readme.read_text(encoding="utf-8")),
        measured / "bulk-on-paper.md": bulk_paper.paper(measured),
    }
    return {p: text for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text}


def _where(row: Row) -> str:
    """The reports of a row, each with its keys."""
    parts = []
    for report in dict.fromkeys(name for name, _ in row.keys):
        keys = dict.fromkeys(key for name, key in row.keys if name == report)
        parts.append("<br>".join([f"[{report}]({report}.json)", *(f"`{key}`" for key in keys)]))
    return "<br>".join(parts)


@cache
def _report(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
