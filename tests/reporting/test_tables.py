"""A table in its three forms."""

from __future__ import annotations

from hilora.reporting.tables import Row, Table

TABLE = Table(
    ("name", "time\n(s)", "words", "none"),
    (Row(("a|b", "−1.0", "x < y", "–")), Row(("3-NN", "–", "", "–")), Row(("other", "12", "some", "–"), True)),
)


def test_plain_text() -> None:
    assert TABLE.text().splitlines() == [
        "       time",
        "name    (s)  words  none",
        "------------------------",
        "a|b    −1.0  x < y     –",
        "3-NN      –            –",
        "------------------------",
        "other    12  some      –",
    ]


def test_markdown() -> None:
    assert TABLE.markdown().splitlines() == [
        "| name | time (s) | words | none |",
        "| :-- | --: | :-- | --: |",
        "| a\\|b | −1.0 | x \\< y | – |",
        "| 3-NN | – |  | – |",
        "| *for reference* |  |  |  |",
        "| other | 12 | some | – |",
    ]


def test_html() -> None:
    text = TABLE.html()
    assert "<tr><th scope=row class=left>a|b</th><td>−1.0</td><td class=left>x &lt; y</td><td>–</td></tr>" in text
    assert "<thead><tr><th scope=col class=left>name</th><th scope=col>time\n(s)</th>" in text
    assert "<caption>" not in text
    assert "<caption>A &lt; B</caption>" in Table(("a",), (), "A < B").html()
    assert text.count("<tr class=rule><th scope=row class=left>other") == text.count("class=rule") == 1


def test_the_first_column_is_to_the_left_whatever_it_says() -> None:
    assert Table(("name", "figure"), (Row(("3-NN", "1")), Row(("+LoRA", "2")))).left == [True, False]


def test_a_table_without_rows() -> None:
    assert Table(("a", "b"), ()).text() == "a  b\n----"
    assert Table(("a", "b"), ()).markdown() == "| a | b |\n| :-- | :-- |"
