"""Charts as inline SVG that fill any width with text of one size, and cells of tables with a shade or a bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple, TypeVar

T = TypeVar("T")

MOST = 1000  # points of a chart, and rows of a table
SIDE = 1000  # of the square that a plot is drawn in, whatever its shape on the page


def spaced(found: Sequence[T]) -> list[T]:
    """All that was found, or as much as a page has room for: evenly spaced, the first and the last with them."""
    if len(found) <= MOST:
        return list(found)
    return [found[round(n * (len(found) - 1) / (MOST - 1))] for n in range(MOST)]


class Point(NamedTuple):
    """A place in a plot: `x` as a fraction of its width, and the value there."""

    x: float
    y: float


class Span(NamedTuple):
    """A named part of a plot's width, from one fraction of it to another."""

    name: str
    start: float
    end: float


class Axis(NamedTuple):
    """What the height of a plot stands for: from `low` to `high`, with lines at `ticks`."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """As a fraction of the height, from above."""
        return (self.high - value) / (self.high - self.low)


def axis(values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> Axis:
    """Room for all values, to the next round number but not beyond `low` and `high`, with about five lines."""
    least, most = min(values, default=0.0), max(values, default=1.0)
    step = _step((most - least) or 1.0, 5.5)
    first, last = math.floor(least / step), math.ceil(most / step)
    last += first == last
    ticks = tuple(step * n for n in range(first, last + 1) if low <= step * n <= high)
    return Axis(max(low, step * first), min(high, step * last), ticks)


def _step(span: float, most: float) -> float:
    """The smallest round number that a span has at most so many of."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most)


def numbered(first: int, last: int) -> list[tuple[float, str]]:
    """Places and names of some of the numbers from `first` to `last`, each in the middle of its share."""
    count = last - first + 1
    step = max(1, round(_step(count, 7)))
    return [((n - first + 0.5) / count, str(n)) for n in range(first, last + 1) if n % step == 0]


def curve(name: str, points: Sequence[Point], heights: Axis) -> str:
    """A line through points, or a dot where there is one."""
    if not points:
        return ""
    steps = " ".join(f"{SIDE * x:.1f} {SIDE * heights.place(y):.1f}" for x, y in points)
    return f'<path class={name} data-series={name} d="M{steps}{"h0" if len(points) == 1 else ""}"/>'


def column(name: str, start: float, end: float, value: float, heights: Axis, text: str) -> str:
    """A bar between 0 and a value, from one fraction of the width to another."""
    above, below = sorted((heights.place(value), heights.place(0.0)))
    shape = f'x="{SIDE * start:.2f}" width="{SIDE * (end - start):.2f}" y="{SIDE * above:.1f}"'
    tall = f'height="{max(SIDE * (below - above), 1):.1f}"'  # a value of 0 is seen, too
    return f"<rect class={name} data-series={name} {shape} {tall}><title>{escape(text)}</title></rect>"


def chart(
    points: str,
    caption: str,
    description: str,
    marks: str,
    heights: Axis,
    series: Sequence[tuple[str, str]],
    spans: Sequence[Span] = (),
    below: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure with a plot.

    Args:
        points: the name of the embedded data that say what there is to be read at each place.
        caption: what is shown.
        description: what can be seen in it, for those who cannot.
        marks: what `curve` and `column` made.
        heights: the vertical axis.
        series: class and name of each.
        spans: have their names above, and borders between them.
        below: places and texts along the horizontal axis.
    """
    legend = "".join(
        f'<li><label><input type="checkbox" value="{name}" checked> <i class={name}></i>{escape(text)}</label></li>'
        for name, text in series
    )
    inner = f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" width="100%" height="100%">{marks}</svg>'
    return (
        f'<figure data-points="{points}">\n<figcaption>{escape(caption)}</figcaption>\n<ul class=legend>{legend}</ul>\n'
        f'<svg class=plot role="img" aria-label="{escape(description)}">'
        f"{_grid(heights)}{_borders(spans)}{inner}{''.join(_below(*one) for one in below)}"
        '<line class=cursor y1="0" y2="100%" hidden /></svg>\n<output></output>\n</figure>'
    )


def _grid(heights: Axis) -> str:
    lines = []
    for tick in heights.ticks:
        y, kind = f"{100 * heights.place(tick):.2f}%", " class=zero" if tick == 0 else ""
        text = f"{tick:g}".replace("-", "−")
        lines.append(f'<line{kind} x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="-6" y="{y}" dy=".32em" text-anchor="end">{text}</text>')
    return "".join(lines)


def _borders(spans: Sequence[Span]) -> str:
    """Lines between parts and their names above, in two rows where they would meet on a narrow page."""
    found = []
    reach = [0.0, 0.0]  # where the names of the lower and of the upper row end
    for number, (name, start, end) in enumerate(spans):
        short = name if len(name) <= 18 else name[:17] + "…"
        half = 0.012 * (len(short) + 1)
        centre = min(max((start + end) / 2, half), 1 - half)
        row = 0 if centre - half >= reach[0] else 1
        reach[row] = centre + half
        x = f"{100 * start:.2f}%"
        if number:
            found.append(f'<line class=border x1="{x}" x2="{x}" y1="-8" y2="100%"/>')
        place = f'x="{100 * centre:.2f}%" y="-{12 + 15 * row}"'
        found.append(f'<text {place} text-anchor="middle">{escape(short)}</text>')
    return "".join(found)


def _below(x: float, text: str) -> str:
    return f'<text x="{100 * x:.2f}%" y="100%" dy="1.4em" text-anchor="middle">{escape(text)}</text>'


class Cell(NamedTuple):
    """A figure, and its share, from 0 to 1, that is shown behind it; None shows nothing."""

    text: str
    share: float | None = None


def shaded(kind: str, caption: str, header: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """A table whose cells show their share: `kind` "heat" by a colour, "bar" by a length."""

    def cell(one: Cell) -> str:
        shown = "" if one.share is None else f' class={kind} style="--share:{one.share:.3f}"'
        return f"<td{shown}>{escape(one.text)}</td>"

    head = "".join(
        f"<th scope=col{'' if place else ' class=left'}>{escape(one)}</th>" for place, one in enumerate(header)
    )
    body = "\n".join(
        f"<tr><th scope=row class=left>{escape(name)}</th>{''.join(map(cell, cells))}</tr>" for name, cells in rows
    )
    return (
        f'<div class="scroll shaded"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )
