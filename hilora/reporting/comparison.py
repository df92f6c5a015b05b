"""Runs side by side: one row of figures for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hilora.files import PathLike, write_json, write_text
from hilora.reporting.budgets import budget_table
from hilora.reporting.document import Block, Heading, Link, Paragraph, markdown, page
from hilora.reporting.tables import MISSING, Row, Table

Summary = Mapping[str, Any]
Cell = Callable[[Summary], str]
LEGEND = "Accuracies in %, mean over clients; tail: mean of the worst tenth of clients; std: over clients."
BUDGETS = "Clients of each budget: accuracies in %, bytes a client and round, FLOPs by image of the rounds."
INTERRUPTED = "* interrupted before its last round."
GLYPHS = (
    "Warning: glyphs are generated images, and their small ViT was pretrained on such by this project:\n"
    "these figures say nothing about CIFAR-100."
)


def comparison_text(summaries: Sequence[Summary]) -> str:
    """Runs as plain text, one row a strategy; those of other data, partitions or seeds form tables of their own.

    Args:
        summaries: contents of `summary.json` files; what is missing in one shows as a dash.
    """
    return "\n\n".join(
        "\n".join(block.text() if isinstance(block, Table) else block.text for block in blocks)
        for blocks in _comparison(summaries, ("data", "backbone", "partition", "seed"), {})
    )


def comparison_markdown(summaries: Sequence[Summary]) -> str:
    """Runs in Markdown, with their partitions and seeds; each data set and backbone forms a table."""
    return "\n\n".join(markdown(blocks, "") for blocks in _comparison(summaries, ("data", "backbone"), SETTING))


def write_comparison(out: PathLike, summaries: Sequence[Summary]) -> None:
    """Leave a table of several runs in `comparison.md` and `comparison.html`, and their summaries as a list in
    `comparison.json`.

    Args:
        out: the folder with those of the runs, each of which has the name of its strategy.
        summaries: contents of `summary.json` files, in the order of the rows.
    """
    links = [Link(f"{run['strategy']}/report.html", f"{run['strategy']}: its report") for run in summaries]
    tables = [block for blocks in _comparison(summaries, ("data", "backbone"), SETTING) for block in blocks]
    write_text(Path(out) / "comparison.md", markdown([*tables, *links], "") + "\n")
    heading: list[Block] = [Heading(1, "Strategies side by side")]
    write_text(Path(out) / "comparison.html", page("Strategies side by side", [*heading, *tables, *links]))
    write_json(Path(out) / "comparison.json", list(summaries))


def _comparison(
    summaries: Sequence[Summary], together: Sequence[str], more: Mapping[str, Cell]
) -> Iterator[list[Paragraph | Table]]:
    """A table, with what belongs around it, of the runs that have the same values under the keys `together`."""
    names: dict[str, Cell] = {"strategy": _strategy, **more}
    columns = {**names, **RESULTS}
    for setting, runs in _by(summaries, *together):
        said = ", ".join(f"{key} {value}" for key, value in setting.items())
        rows = tuple(Row(tuple(cell(run) for cell in columns.values())) for run in runs)
        budgets = budget_table([(tuple(cell(run) for cell in names.values()), run) for run in runs], tuple(names))
        yield [
            Paragraph(said[0].upper() + said[1:]),
            *([Paragraph(GLYPHS)] if setting["data"] == "glyphs" else []),
            Table(tuple(columns), rows),
            Paragraph(LEGEND),
            *([Paragraph(INTERRUPTED)] if any(run.get("interrupted") for run in runs) else []),
            *((Paragraph(BUDGETS), budgets) if budgets else ()),
        ]


def _by(summaries: Sequence[Summary], *keys: str) -> Iterator[tuple[dict[str, str], list[Summary]]]:
    """Runs with the same values of `keys` together, in order of first appearance."""

    def setting(summary: Summary) -> tuple[str, ...]:
        return tuple(str(summary.get(key, MISSING)) for key in keys)

    seen = list(dict.fromkeys(map(setting, summaries)))
    for values, runs in groupby(sorted(summaries, key=lambda s: seen.index(setting(s))), key=setting):
        yield dict(zip(keys, values, strict=True)), list(runs)


def _strategy(summary: Summary) -> str:
    published = ", published" if summary.get("config", {}).get("published") else ""
    return f"{summary['strategy']}{published}{'*' if summary.get('interrupted') else ''}"


def _value(*keys: str, form: str = "{}", scale: float | None = None) -> Cell:
    """The cell for `summary[key][key]...`, or a dash where that is missing."""

    def cell(summary: Summary) -> str:
        found: Any = summary
        for key in keys:
            found = found.get(key) if found else None
        if found is None or found != found:
            return MISSING
        return form.format(found if scale is None else scale * found)

    return cell


def _percent(*keys: str) -> Cell:
    return _value(*keys, form="{:.1f}", scale=100)


SETTING = {"partition": _value("partition"), "seed": _value("seed")}
RESULTS = {
    "root": _percent("tiers", "root", "mean"),
    "+ cluster": _percent("tiers", "cluster", "mean"),
    "+ leaf": _percent("tiers", "leaf", "mean"),
    "final": _percent("final", "mean"),
    "tail": _percent("final", "tail"),
    "std": _percent("final", "std"),
    "unseen\nzero leaf": _percent("unseen", "zero_leaf"),
    "unseen\nleaf": _percent("unseen", "leaf"),
    "K": _value("clusters", "k"),
    "ARI": _value("clusters", "ari", form="{:.2f}"),
    "time\n(s)": _value("seconds", form="{:.0f}"),
    "img/s": _value("images_per_second", form="{:.0f}"),
}
