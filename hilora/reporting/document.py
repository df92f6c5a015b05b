"""A report as blocks, written as Markdown or as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hilora.errors import FileError
from hilora.files import plain
from hilora.reporting.tables import Table, escaped

ASSETS = Path(__file__).with_name("assets")


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


@dataclass(frozen=True)
class Link:
    """To a file, from the folder of the report."""

    path: str
    text: str


@dataclass(frozen=True)
class Html:
    """What only a page can show; Markdown leaves it out."""

    text: str


Block = Heading | Paragraph | Code | Table | Picture | Link | Html


def markdown(blocks: Iterable[Block], pictures: str, level: int = 1) -> str:
    """The blocks as Markdown.

    Args:
        blocks: in their order.
        pictures: what stands before a picture's file name in its link.
        level: of the title.
    """
    return "\n\n".join(_markdown(block, pictures, level) for block in blocks if not isinstance(block, Html))


def _markdown(block: Heading | Paragraph | Code | Table | Picture | Link, pictures: str, level: int) -> str:
    match block:
        case Heading():
            return f"{'#' * (block.level + level - 1)} {escaped(block.text)}"
        case Paragraph():
            return escaped(block.text)
        case Code():
            return f"```\n{block.text}\n```"
        case Picture():
            return f"![{escaped(block.text)}]({pictures}{block.path.name})"
        case Link():
            return f"[{escaped(block.text)}]({quote(block.path)})"
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


def page(title: str, blocks: Iterable[Block], data: Mapping[str, Any] | None = None) -> str:
    """The blocks as an HTML page, pictures and all in one file.

    Args:
        title: of the window.
        blocks: in their order.
        data: what charts and tables say when they are pointed at or sorted; None for a page without a script.
    """
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    body = "\n".join(map(_html, blocks))
    script = "" if data is None else _script(data)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{script}</body>\n</html>\n"
    )


def _script(data: Mapping[str, Any]) -> str:
    """The data as JSON in plain ASCII, in which no sign can end the element that it stands in; and what reads them."""
    text = json.dumps(plain(data), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    code = (ASSETS / "report.js").read_text(encoding="utf-8")
    return f'<script type="application/json" id="data">{text}</script>\n<script>\n{code}</script>\n'


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
        case Link():
            return f'<p><a href="{escape(quote(block.path))}">{escape(block.text)}</a></p>'
        case Html():
            return block.text
        case Table():
            return block.html()
