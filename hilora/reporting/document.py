"""A report as blocks, written as Markdown or as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hilora.errors import FileError
from hilora.reporting.tables import Table, escaped


@dataclass(frozen=True)
class Heading:
    """`level` 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Picture:
    path: Path
    text: str


Block = Heading | Paragraph | Code | Table | Picture


def markdown(blocks: Iterable[Block], pictures: str, level: int = 1) -> str:
    """The blocks as Markdown.

    Args:
        blocks: in their order.
        pictures: what stands before a picture's file name in its link.
        level: of the title.
    """
    return "\n\n".join(_markdown(block, pictures, level) for block in blocks)


def _markdown(block: Block, pictures: str, level: int) -> str:
    match block:
        case Heading():
            return f"{'#' * (block.level + level - 1)} {escaped(block.text)}"
        case Paragraph():
            return escaped(block.text)
        case Code():
            return f"```\n{block.text}\n```"
        case Picture():
            return f"![{escaped(block.text)}]({pictures}{block.path.name})"
        case Table():
            return block.markdown()


def between(path: Path, begin: str, end: str, text: str) -> str:
    """A file's text with what is between its markers exchanged for lines of `text`.

    Raises:
        FileError: the file does not have both markers, in their order.
    """
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise FileError(f"{path} needs a line {begin} and after it a line {end}, for what is written between them")
    return f"{before}{begin}\n{text}\n{end}{after}"


def page(title: str, blocks: Iterable[Block]) -> str:
    """The blocks as an HTML page, pictures and all in one file."""
    body = "\n".join(map(_html, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{escape(block.text)}</p>"
        case Code():
            return f"<pre>{escape(block.text)}</pre>"
        case Picture():
            data = base64.b64encode(block.path.read_bytes()).decode()
            return f'<img src="data:image/png;base64,{data}" alt="{escape(block.text)}">'
        case Table():
            return block.html()


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d5dbe1; --paper: #fff; --fill: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #39424c; --paper: #14181d; --fill: #1c2229; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; } pre, .scroll { overflow-x: auto; }
pre { background: var(--fill); padding: .7rem; border-radius: 6px; font-size: .85rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); vertical-align: bottom; } td { white-space: nowrap; }
.left { text-align: left; } td.left:not(:first-child) { white-space: normal; min-width: 6rem; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); }
tr.rule td { border-top: 3px double var(--soft); }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; background: #fff; border-radius: 6px; }
"""
