"""Builds a self-contained HTML page: light and dark, for phone and print, without scripts or network."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1d2329; --soft: #5b6670; --line: #d5dbe1; --panel: #f5f7f9;
  --good: #1a7f4b; --note: #96650a; --bad: #b3261e; --s0: #2563b0; --s1: #c2540a; --s2: #1a7f6b; --s3: #8a3fa0;
  --s4: #6b7280; --s5: #a3194f; --heat: 37, 99, 176; }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #14181c; --ink: #e4e8ec; --soft: #9aa5b0;
  --line: #353d45; --panel: #1c2228; --good: #5cc98f; --note: #e2b04a; --bad: #f28b82; --s0: #7ab0f0;
  --s1: #f0a060; --s2: #60c9b0; --s3: #cf9be0; --s4: #a8b0ba; --s5: #f08ab0; --heat: 122, 176, 240; } }
@media print { :root { color-scheme: light; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #fff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.25rem 1rem 3rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h1, p { overflow-wrap: anywhere; }
p, li { max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); font-size: .875rem; text-align: left; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; } td.heat { padding-left: .7rem; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; }
td.heat { padding: .3rem .4rem; } td.heat.bad { font-weight: 700; }
.good { color: var(--good); } .note { color: var(--note); } .bad { color: var(--bad); } .verdict { font-weight: 650; }
.plots figure { max-width: 36rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 14px; }
.faces { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; }
.faces img { width: 100%; max-width: 112px; border-radius: .3rem; display: block; }
.faces figcaption { overflow-wrap: anywhere; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0 0; padding: 0;
  font-size: .85rem; } ul.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem;
  margin-right: .35rem; vertical-align: -1px; }
@page { margin: 14mm; }
@media print { body { max-width: none; padding: 0 1px; font-size: 14px; } h2 { margin-top: 1.4rem; }
  h2, section > p { break-after: avoid; } figure, tr { break-inside: avoid; } thead { display: table-header-group; }
  .scroll { overflow: visible; } table { font-size: .75rem; } th, td { padding-right: .5rem; white-space: normal; }
  td:not(.n) { overflow-wrap: break-word; } td.n { white-space: nowrap; }
  ul.legend i, td.heat { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(title: str, subtitle: str, *blocks: str) -> str:
    """The whole page; title and subtitle are text, blocks are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>\n'
        + "\n".join(blocks)
        + "\n</body></html>\n"
    )


def section(heading: str, *content: str) -> str:
    """A heading and its content (HTML)."""
    return f"<section><h2>{escape(heading)}</h2>{''.join(content)}</section>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text; kind: soft, good, note, bad or empty."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """A table; numbers are right-aligned; a cell that is a pair is (text, class)."""
    number = [all(_is_number(row[i]) for row in rows) if rows else False for i in range(len(head))]
    top = "".join(f'<th class="{"n" if n else ""}">{escape(h)}</th>' for h, n in zip(head, number, strict=True))
    body = "".join(
        "<tr>" + "".join(_cell(cell, n) for cell, n in zip(row, number, strict=True)) + "</tr>" for row in rows
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{told}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def heat_map(head: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float | None]]]]) -> str:
    """A table of cells (text, 0..1 or None) shaded by that value, red beyond 1; each row starts with its label."""
    top = "".join(f'<th class="{"n" if i else ""}">{escape(h)}</th>' for i, h in enumerate(head))
    body = ""
    for label, cells in rows:
        body += f'<tr><td class="wrap">{escape(label)}</td>'
        for text, heat in cells:
            shade = 0.55 * min(max(heat or 0, 0), 1)
            style = f' style="background: rgba(var(--heat), {shade:.3f})"' if heat is not None else ""
            beyond = " bad" if heat is not None and heat > 1 else ""
            body += f'<td class="n heat{beyond}"{style}>{escape(text)}</td>'
        body += "</tr>"
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figures(*plots: str) -> str:
    """Plots side by side if there is room, otherwise below each other."""
    return f'<div class="plots">{"".join(plots)}</div>'


def picture(face_bgr_u8: np.ndarray, caption: str) -> str:
    """A crop, uint8 (112,112,3) BGR, embedded in the page with a caption."""
    import cv2

    data = base64.b64encode(cv2.imencode(".png", face_bgr_u8)[1].tobytes()).decode()
    return (
        f'<figure><img alt="" width="112" height="112" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def faces(*pictures: str) -> str:
    """Pictures side by side."""
    return f'<div class="faces">{"".join(pictures)}</div>'


def verdict(passed: bool, text: str) -> str:
    """The verdict: the line that a reader looks for first."""
    return f'<p class="verdict {"good" if passed else "bad"}">{"Passed" if passed else "Failed"}: {escape(text)}</p>'


def _cell(cell: Any, number: bool) -> str:
    text, kind = cell if isinstance(cell, tuple) else (cell, "")
    classes = " ".join(filter(None, ("n" if number else "", kind)))
    return f'<td class="{classes}">{escape(str(text))}</td>' if classes else f"<td>{escape(str(text))}</td>"


def _is_number(cell: Any) -> bool:
    """Whether a text is a number, with or without spread and unit, and does not merely begin with one."""
    text = str(cell[0] if isinstance(cell, tuple) else cell)
    return text == "—" or re.fullmatch(r"[-+−]?\d[\d.,e %±()–+−-]*", text) is not None
