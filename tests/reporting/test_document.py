"""Blocks as Markdown and as HTML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hilora.errors import FileError
from hilora.reporting.document import Block, Code, Heading, Html, Link, Paragraph, Picture, between, markdown, page
from hilora.reporting.tables import Row, Table

TABLE = Table(
    ("name", "figure", "words"),
    (
        Row(("a|b", "−1.0", "some")),
        Row(("c", "–", "")),
        Row(("ref", "+2.0", "x < y"), True),
        Row(("too", "3", ""), True),
    ),
)


def test_markdown() -> None:
    text = markdown([Heading(1, "A *title*"), Paragraph("as_it <is> [a](b) &amp;"), Code("a_b"), TABLE], "", level=2)
    assert text.split("\n\n") == [
        "## A \\*title\\*",
        "as\\_it \\<is> \\[a\\](b) \\&amp;",
        "```\na_b\n```",
        "| name | figure | words |\n| :-- | --: | :-- |\n| a\\|b | −1.0 | some |\n| c | – |  |\n"
        "| *for reference* |  |  |\n| ref | +2.0 | x \\< y |\n| too | 3 |  |",
    ]


def test_html(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(picture)
    text = page("T & t", [Heading(2, "a < b"), Code("x > y"), TABLE, Picture(picture, 'say "it"')])
    assert "<title>T &amp; t</title>" in text
    assert "<h2>a &lt; b</h2>" in text
    assert "<pre>x &gt; y</pre>" in text
    assert text.count("<tr class=rule>") == 1
    assert "<tr class=rule><th scope=row class=left>ref</th><td>+2.0</td><td class=left>x &lt; y</td></tr>" in text
    assert 'alt="say &quot;it&quot;"' in text
    assert 'src="data:image/png;base64,iVBOR' in text


def test_a_picture_is_linked_from_where_the_text_will_be() -> None:
    assert markdown([Picture(Path("/somewhere/a.png"), "A")], "results/") == "![A](results/a.png)"


def test_a_link_is_in_both_and_html_in_a_page_alone() -> None:
    blocks: list[Block] = [Link("a b/c.html", "to <c>"), Html("<hr>")]
    assert markdown(blocks, "") == "[to \\<c>](a%20b/c.html)"
    assert '<p><a href="a%20b/c.html">to &lt;c&gt;</a></p>\n<hr>' in page("t", blocks)


def test_data_in_a_page_cannot_end_their_element() -> None:
    hostile = "</script><!--<script>&\u2028\u2029"
    text = page("t", [], {"said": [hostile], "missing": float("nan")})
    inside = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(inside) == {"said": [hostile], "missing": None}
    assert inside.isascii()
    assert not set("<>&") & set(inside)
    assert "<script" not in page("t", [])


def test_only_what_is_between_the_markers_is_exchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("<b>1</b>2<a>3</a>4")
    assert between(path, "<a>", "</a>", "new") == "<b>1</b>2<a>\nnew\n</a>4"
    for markers in (("<c>", "</c>"), ("</a>", "<a>")):
        with pytest.raises(FileError, match=f"needs a line {markers[0]} and after it"):
            between(path, *markers, "new")
