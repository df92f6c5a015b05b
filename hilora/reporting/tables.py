"""One kind of table, as plain text, as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

MISSING = "–"
FIGURES = tuple("0123456789+−")
REFERENCE = "for reference"


@dataclass(frozen=True)
class Row:
    """The cells of a row; `reference` rows stand below a rule."""

    cells: tuple[str, ...]
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """The first column names the rows and is to the left, as are columns of text; columns of figures are to the right.

    Attributes:
        header: a name for each column; in plain text, it may have several lines.
        rows: as many cells each.
        caption: stands above it on a page.
    """

    header: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str = ""

    @property
    def left(self) -> list[bool]:
        """Which columns are to the left: the first, and those with other text than figures that are missing."""
        columns = [[row.cells[place] for row in self.rows] for place in range(len(self.header))]
        return [
            not (place and (set(cells) == {MISSING} or any(cell[:1] in FIGURES for cell in cells)))
            for place, cells in enumerate(columns)
        ]

    def text(self) -> str:
        """For a terminal."""
        parts = [name.split("\n") for name in self.header]
        height = max(map(len, parts))
        head = [tuple(column) for column in zip(*([""] * (height - len(part)) + part for part in parts), strict=True)]
        body = [row.cells for row in self.rows]
        widths = [max(map(len, cells)) for cells in zip(*head, *body, strict=True)]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [*(_aligned(cells, widths, self.left) for cells in head), rule]
        for row, first in zip(self.rows, self._first_references(), strict=True):
            lines += [rule] if first else []
            lines.append(_aligned(row.cells, widths, self.left))
        return "\n".join(lines)

    def markdown(self) -> str:
        """For a document."""
        names = tuple(name.replace("\n", " ") for name in self.header)
        lines = [tuple(map(escaped, names)), tuple(":--" if left else "--:" for left in self.left)]
        for row, first in zip(self.rows, self._first_references(), strict=True):
            lines += [(f"*{REFERENCE}*", *[""] * (len(names) - 1))] if first else []
            lines.append(tuple(map(escaped, row.cells)))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def html(self) -> str:
        """For a page."""
        rows = [
            f"<tr{' class=rule' if first else ''}>{_cells(_cell, row.cells, self.left)}</tr>"
            for row, first in zip(self.rows, self._first_references(), strict=True)
        ]
        head = _cells(lambda place: "th scope=col", self.header, self.left)
        caption = f"<caption>{escape(self.caption)}</caption>\n" if self.caption else ""
        table = (
            f"<table>\n{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"
        )
        return f"<div class=scroll>{table}</div>"

    def _first_references(self) -> list[bool]:
        """Of each row, whether it is a reference row and the one before it is none."""
        marks = [row.reference for row in self.rows]
        return [mark and not before for mark, before in zip(marks, [False, *marks], strict=False)]


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is."""
    for sign in "\\`*_|<&[]":
        text = text.replace(sign, "\\" + sign)
    return text


def _aligned(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> str:
    parts = zip(cells, widths, left, strict=True)
    return "  ".join(cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in parts).rstrip()


def _cell(place: int) -> str:
    """The cell of a row: the first one names it."""
    return "td" if place else "th scope=row"


def _cells(opens: Callable[[int], str], texts: Sequence[str], left: Sequence[bool]) -> str:
    return "".join(
        f"<{opens(place)}{' class=left' if to_left else ''}>{escape(text)}</{opens(place)[:2]}>"
        for place, (text, to_left) in enumerate(zip(texts, left, strict=True))
    )
