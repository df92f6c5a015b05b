"""The rounds of a run, drawn and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from hilora.reporting.document import Block, Html, Paragraph
from hilora.reporting.run_page.charts import Point, Span, axis, chart, curve, numbered, spaced
from hilora.reporting.run_page.units import percent
from hilora.reporting.tables import MISSING, Row, Table

Mapped = Mapping[str, Any]
SERIES = (
    ("mean", "mean of the clients", "test", "mean"),
    ("tail", "worst tenth of them", "test", "tail"),
    ("validation", "mean on validation images", "val", "mean"),
)


def rounds_section(records: Sequence[Mapped]) -> tuple[list[Block], list[dict[str, Any]]]:
    """Accuracy over the rounds, of very many as many as a page has room for, and what each point in the chart says.

    Args:
        records: the lines of `metrics.jsonl`.
    """
    if not records:
        return [Paragraph("No round has been trained.")], []
    rounds = spaced(records)
    first, last = rounds[0]["round"], rounds[-1]["round"]
    places = [(record["round"] - first + 0.5) / (last - first + 1) for record in rounds]
    curves: dict[str, list[Point]] = {}
    for name, _, split, key in SERIES:
        values = [_value(record, split, key) for record in rounds]
        curves[name] = [Point(x, 100 * y) for x, y in zip(places, values, strict=True) if y is not None]
    heights = axis([y for points in curves.values() for _, y in points], 0, 100)
    stages = [(name, list(part)) for name, part in groupby(rounds, key=lambda record: str(record["stage"]))]
    starts = [(part[0]["round"] - first) / (last - first + 1) for _, part in stages] + [1.0]
    spans = [Span(name, *starts[number : number + 2]) for number, (name, _) in enumerate(stages)]
    series = [(name, text) for name, text, *_ in SERIES if curves[name]]
    said = "; ".join(f"after {name}: {_round_said(part[-1])}" for name, part in stages)
    figure = chart(
        "rounds",
        "Test accuracy in % after each round",
        f"Lines over {len(records)} rounds. {said}",
        "".join(curve(name, points, heights) for name, points in reversed(curves.items())),
        heights,
        series,
        spans,
        numbered(first, last),
    )
    header = ("round", "stage", "loss", "mean", "tail", "std", "validation")
    rows = tuple(Row(_round_cells(record)) for record in rounds)
    table = Table(header, rows, "Accuracies in %").html()
    values_of_all = f"<details><summary>All values</summary><div class=tall>{table}</div></details>"
    said_at = [{"x": x, "text": _round_said(record)} for x, record in zip(places, rounds, strict=True)]
    return [Html(figure), Html(values_of_all)], said_at


def _round_cells(record: Mapped) -> tuple[str, ...]:
    loss = record.get("loss")
    accuracies = [_value(record, "test", name) for name in ("mean", "tail", "std")] + [_value(record, "val", "mean")]
    figures = [MISSING if loss is None else f"{loss:.3f}", *(percent(one, "") for one in accuracies)]
    return (str(record["round"]), str(record["stage"]), *figures)


def _round_said(record: Mapped) -> str:
    figures = [(text, _value(record, split, key)) for _, text, split, key in SERIES]
    known = ", ".join(f"{text} {percent(value)}" for text, value in figures if value is not None)
    return f"round {record['round']}, {record['stage']}: {known or 'not measured'}"


def _value(record: Mapped, split: str, key: str) -> float | None:
    value: float | None = (record.get(split) or {}).get(key)
    return None if value is None or value != value else value
