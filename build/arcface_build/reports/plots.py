"""Plots as SVG figures, coloured by the page's CSS variables so that they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 46
_COLOURS = 6  # --s0 … --s5 of the page


@dataclass(frozen=True)
class Series:
    """A named line or set of points; `band` gives low and high for each point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Axis:
    """One axis: its title and range; `log` for a logarithmic one."""

    title: str
    low: float
    high: float
    log: bool = False

    def part(self, value: float) -> float:
        """The position of a value between the ends, 0..1."""
        if self.log:
            value = min(max(value, self.low), self.high)
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1)

    def ticks(self) -> list[float]:
        """Round values to label."""
        if self.log:
            return [10.0**e for e in range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)]
        step = 10 ** math.floor(math.log10((self.high - self.low) or 1))
        step = next(s for s in (step / 5, step / 2, step, 2 * step) if (self.high - self.low) / s <= 6)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis, marks: bool = False) -> str:
    """Line plot with a legend below; `marks` also draws the points, numbered if colours run out."""
    body, many = _frame(x, y), marks and len(series) > _COLOURS
    for number, line in enumerate(series):
        points = [(_across(x, a), _up(y, b)) for a, b in zip(line.x, line.y, strict=True)]
        if line.band:
            edge = [(_across(x, a), _up(y, high)) for a, (_, high) in zip(line.x, line.band, strict=True)]
            edge += [(_across(x, a), _up(y, low)) for a, (low, _) in zip(line.x, line.band, strict=True)][::-1]
            body += f'<polygon points="{_path(edge)}" fill="{_colour(number)}" opacity="0.18"/>'
        dash = "" if number % 2 == 0 or marks else ' stroke-dasharray="6 4"'
        body += f'<polyline points="{_path(points)}" fill="none" stroke="{_colour(number)}" stroke-width="2.5"{dash}/>'
        if marks:
            body += "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{_colour(number)}"/>' for a, b in points)
        if many and len(points) == 1:
            body += f'<text x="{points[0][0] + 6:.1f}" y="{points[0][1] - 5:.1f}">{number}</text>'
    return _figure(title, body, [f"{i}: {s.name}" if many and len(s.x) == 1 else s.name for i, s in enumerate(series)])


def bars(title: str, labels: Sequence[str], values: Sequence[float], x_title: str, y_title: str) -> str:
    """Vertical bars with their counts on top; a label is at the left edge of its bar."""
    y = Axis(y_title, 0, max(*values, 1) * 1.12)
    room = (WIDTH - _LEFT - _RIGHT) / len(values)
    bottom = HEIGHT - _BOTTOM
    body = _frame(None, y)
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        left, top = _LEFT + i * room, _up(y, value)
        size = f'width="{room - 2:.1f}" height="{HEIGHT - _BOTTOM - top:.1f}"'
        body += f'<rect x="{left + 1:.1f}" y="{top:.1f}" {size} fill="var(--s0)"/>'
        if value:
            body += f'<text x="{left + room / 2:.1f}" y="{top - 4:.1f}" text-anchor="middle">{value:g}</text>'
        if label:
            body += f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="var(--soft)"/>'
            body += f'<text x="{left:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(label)}</text>'
    body += f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    return _figure(title, body, [])


def waterfall(title: str, steps: Sequence[tuple[str, float, str]], unit: str) -> str:
    """Horizontal bars: (name, value, text at its end); a line marks the end of the first one."""
    row, top, label = 46, 8, 20
    height = top + row * len(steps) + 8
    most = max((value for _, value, _ in steps), default=1) or 1
    body = ""
    for i, (name, value, told) in enumerate(steps):
        y = top + i * row
        width = (WIDTH - 24) * value / most
        body += f'<text x="12" y="{y + 14}" style="fill: var(--ink)">{escape(name)}</text>'
        body += f'<text x="{WIDTH - 12}" y="{y + 14}" text-anchor="end">{escape(told)}</text>'
        colour = "var(--s4)" if i == 0 else "var(--s0)"
        body += f'<rect x="12" y="{y + label}" width="{width:.1f}" height="16" rx="2" fill="{colour}"/>'
    first = 12 + (WIDTH - 24) * (steps[0][1] / most if steps else 0)
    line = f'x1="{first:.1f}" x2="{first:.1f}" y1="{top}" y2="{height - 8}"'
    body += f'<line {line} stroke="var(--soft)" stroke-dasharray="3 4"/>'
    return _figure(f"{title} ({unit})", body, [], height)


def ranges(title: str, rows: Sequence[tuple[str, float, float, float]], one: bool = False) -> str:
    """Horizontal spreads: (name, low, median, high), the median as a dot; `one` draws a line at 1."""
    row, top = 40, 8
    height = top + row * len(rows) + 26
    axis = Axis("", 0, 1.08 * max([high for *_, high in rows] + [1.0 if one else 0.0]))
    bottom = height - 22

    def across(value: float) -> float:
        return 12 + axis.part(value) * (WIDTH - 24)

    body = ""
    for tick in axis.ticks():
        at, line = across(tick), "var(--soft)" if one and tick == 1 else "var(--line)"
        body += f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}" stroke="{line}"/>'
        body += f'<text x="{at:.1f}" y="{height - 6}" text-anchor="middle">{_number(tick)}</text>'
    for i, (name, low, median, high) in enumerate(rows):
        y = top + i * row + 26
        body += f'<text x="12" y="{y - 10}" style="fill: var(--ink)">{escape(name)}</text>'
        body += f'<text x="{WIDTH - 12}" y="{y - 10}" text-anchor="end">{median:.3g}</text>'
        line = f'x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{y}" y2="{y}"'
        body += f'<line {line} stroke="var(--s0)" stroke-width="4" stroke-linecap="round" opacity="0.5"/>'
        body += f'<circle cx="{across(median):.1f}" cy="{y}" r="5" fill="var(--s0)"/>'
    return _figure(title, body, [], height)


def _frame(x: Axis | None, y: Axis) -> str:
    """Grid, tick labels and axis titles."""
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    body = ""
    for tick in y.ticks():
        at = _up(y, tick)
        body += f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>'
        body += f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
    if x is not None:
        for tick in x.ticks():
            at = _across(x, tick)
            body += f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}" stroke="var(--line)"/>'
            body += f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{_number(tick)}</text>'
        body += f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>'
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    return body + f'<text x="14" y="{middle}" {turned} text-anchor="middle">{escape(y.title)}</text>'


def _figure(title: str, body: str, names: Sequence[str], height: float = HEIGHT) -> str:
    legend = "".join(f'<li><i style="background: {_colour(i)}"></i>{escape(n)}</li>' for i, n in enumerate(names))
    legend = f'<ul class="legend">{legend}</ul>' if len(names) > 1 else ""
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">{body}</svg>'
        f"{legend}<figcaption>{escape(title)}</figcaption></figure>"
    )


def _across(axis: Axis, value: float) -> float:
    return _LEFT + axis.part(value) * (WIDTH - _LEFT - _RIGHT)


def _up(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.part(value) * (HEIGHT - _TOP - _BOTTOM)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _colour(number: int) -> str:
    return f"var(--s{number % _COLOURS})"


def _number(value: float) -> str:
    if value and (abs(value) <= 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"
