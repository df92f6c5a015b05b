"""The pages of the documentation, and the code on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/**/*.md",
        "benchmarks/experiments/*.md",
        "benchmarks/results/*.md",
    )
    for path in ROOT.glob(pattern)
)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: what stands behind the fence; "" for nothing.
        title: the file that it is the content of, or "".
        line: the number of its first line in the page.
        text: without the fences.
    """

    language: str
    title: str
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found["language"], found["title"] or "", text.count("\n", 0, found.start("text")) + 1, found["text"])
        for found in FENCE.finditer(text)
    ]


def prose(page: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", (ROOT / page).read_text(encoding="utf-8")))


def program(page: str) -> str:
    """The Python of a page that has no title, each line where it stands in the page."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python" and not block.title:
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines)


def commands(page: str) -> Iterator[str]:
    """The commands of a page, those of several lines as one."""
    for block in blocks(page):
        if block.language in ("", "console", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                command = line.removeprefix("$ ").partition(" #")[0].strip()
                if re.match(r"(python|hilora|make|pip|pytest) ", command):
                    yield command
