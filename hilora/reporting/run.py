"""How a run tells what it does and did: progress on the terminal, tables of results, pictures in its folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from hilora.algorithms.clustering import Clustering

Summary = Mapping[str, Any]
MISSING = "–"


class Progress:
    """Rounds done, accuracy and time left as a bar on stderr; at the end of a stage, a line on stdout.

    Args:
        total_rounds: rounds of the whole run.
        label: stands before the bar and every line.
        enabled: whether to draw the bar; None draws it where stderr is a terminal.
    """

    def __init__(self, total_rounds: int, label: str, enabled: bool | None = None) -> None:
        self.label = label
        self._total = total_rounds
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._bar: tqdm[Any] | None = None
        self._last: Mapping[str, Any] | None = None

    def __enter__(self) -> Progress:
        form = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"  # fits 80 columns
        disable = not self._enabled
        self._bar = tqdm(total=self._total, desc=self.label, bar_format=form, dynamic_ncols=True, disable=disable)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()  # before all else: whatever happened, the terminal is whole again
            self._bar = None
        if self._last is not None:
            self._stage_line("done" if kind is None else "stopped")

    def round(self, record: Mapping[str, Any]) -> None:
        """Show a round; the first one of a resumed run moves the bar to where it left off."""
        if self._last is not None and self._last["stage"] != record["stage"]:
            self._stage_line("done")
        if self._bar is not None:
            if self._last is None:
                self._bar.initial = self._bar.n = record["round"] - 1
            self._bar.set_postfix_str(f"{record['stage']}, {_standing(record)}", refresh=False)
            self._bar.update(record["round"] - self._bar.n)
        self._last = record

    def note(self, text: str) -> None:
        """Print a line to stdout without breaking the bar."""
        encoding = sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)  # an ASCII terminal must not end the run
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _stage_line(self, state: str) -> None:
        assert self._last is not None
        count, seconds = self._last["round_in_stage"], self._last.get("seconds")
        pace = "" if seconds is None else f" ({seconds:.1f} s the last)"
        rounds = f"{count} round{'' if count == 1 else 's'}"
        self.note(f"{self.label}: {self._last['stage']} {state}, {rounds}{pace}, {_standing(self._last)}")


@dataclass(frozen=True)
class Column:
    """One column of a table of results: its header, of one or two lines, and the cell of a run."""

    header: str
    cell: Callable[[Summary], str]


def _value(*keys: str, form: str = "{}", scale: float | None = None) -> Callable[[Summary], str]:
    """The cell for `summary[key][key]...`, or a dash where that is missing."""

    def cell(summary: Summary) -> str:
        found: Any = summary
        for key in keys:
            found = found.get(key) if found else None
        if found is None or found != found:
            return MISSING
        return form.format(found if scale is None else scale * found)

    return cell


def _percent(*keys: str) -> Callable[[Summary], str]:
    return _value(*keys, form="{:.1f}", scale=100)


def _strategy(summary: Summary) -> str:
    published = ", published" if summary.get("config", {}).get("published") else ""
    return f"{summary['strategy']}{published}{'*' if summary.get('interrupted') else ''}"


STRATEGY = Column("strategy", _strategy)
SETTING = (Column("partition", _value("partition")), Column("seed", _value("seed")))
RESULTS = (
    Column("root", _percent("tiers", "root", "mean")),
    Column("+ cluster", _percent("tiers", "cluster", "mean")),
    Column("+ leaf", _percent("tiers", "leaf", "mean")),
    Column("final", _percent("final", "mean")),
    Column("tail", _percent("final", "tail")),
    Column("std", _percent("final", "std")),
    Column("unseen\nzero leaf", _percent("unseen", "zero_leaf")),
    Column("unseen\nleaf", _percent("unseen", "leaf")),
    Column("K", _value("clusters", "k")),
    Column("ARI", _value("clusters", "ari", form="{:.2f}")),
    Column("time\n(s)", _value("seconds", form="{:.0f}")),
    Column("img/s", _value("images_per_second", form="{:.0f}")),
)
LEGEND = "Accuracies in %, mean over clients; tail: mean of the worst tenth of clients; std: over clients."
INTERRUPTED = "* interrupted before its last round."
GLYPHS = (
    "Warning: glyphs are generated images, and their small ViT was pretrained on such by this project:\n"
    "these figures say nothing about CIFAR-100."
)


def table(summaries: Sequence[Summary]) -> str:
    """Results as plain text, one row a strategy; runs on other data, partitions or seeds form tables of their own.

    Args:
        summaries: contents of `summary.json` files; what is missing in one shows as a dash.
    """
    columns = (STRATEGY, *RESULTS)
    blocks = []
    for setting, runs in _by(summaries, "data", "backbone", "partition", "seed"):
        head = list(zip(*((["", *column.header.split("\n")])[-2:] for column in columns), strict=True))
        body = [[column.cell(run) for column in columns] for run in runs]
        widths = [max(map(len, cells)) for cells in zip(*head, *body, strict=True)]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        rows = [_aligned(row, widths) for row in head] + [rule] + [_aligned(row, widths) for row in body]
        blocks.append("\n".join([*_preamble(setting), *rows, *_footnotes(runs)]))
    return "\n\n".join(blocks)


def markdown_table(summaries: Sequence[Summary]) -> str:
    """Results of many runs in Markdown, with their partitions and seeds; each data set and backbone forms a table."""
    columns = (STRATEGY, *SETTING, *RESULTS)
    blocks = []
    for setting, runs in _by(summaries, "data", "backbone"):
        head = [column.header.replace("\n", " ") for column in columns]
        rule = [":--" if column in (STRATEGY, *SETTING[:1]) else "--:" for column in columns]
        body = [[column.cell(run).replace("|", r"\|").replace("*", r"\*") for column in columns] for run in runs]
        rows = ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
        notes = [note.replace("*", r"\*") for note in _footnotes(runs)]
        blocks.append("\n".join(["\n\n".join(_preamble(setting)), "", *rows, "", *notes]))
    return "\n\n".join(blocks)


def write_report(
    out: str | os.PathLike[str],
    summary: Summary,
    records: Sequence[Mapping[str, Any]],
    counts: Tensor,
    seen: Tensor,
    groups: Tensor | None = None,
    group_names: Sequence[str] = (),
    clustering: Clustering | None = None,
) -> None:
    """Draw `accuracy.png`, `clusters.png` and `classes.png` of a run.

    Args:
        out: the run's folder.
        summary: what `summary.json` says; names the run in the titles.
        records: the lines of `metrics.jsonl`.
        counts: int `[n, classes]`, training images of every class at each client.
        seen: bool `[n]`, False for the clients held out.
        groups: int `[n]`, the true group of each client, where known.
        group_names: names of these groups.
        clustering: how the clusters in the summary, those of the seen clients in their order, were found; None where
            there are none, or where they came about without distances between clients.
    """
    from hilora.reporting import plots

    out = Path(out)
    title = "{strategy} on {data}, {partition}, seed {seed}".format_map(summary)
    title += " (interrupted)" if summary.get("interrupted") else ""
    seen, counts = seen.bool().cpu(), counts.cpu()
    groups = None if groups is None else groups.cpu()
    every = None if groups is None else groups.numpy()
    some = None if groups is None else groups[seen].numpy()
    plots.plot_accuracy(records, out / "accuracy.png", title)
    clusters = summary.get("clusters")
    plots.plot_clusters(
        None if clustering is None else clustering.distances.cpu().numpy(),
        None if clusters is None else np.asarray(clusters["labels"]),
        None if clustering is None else clustering.eigengaps.cpu().numpy(),
        0 if clusters is None else clusters["k"],
        out / "clusters.png",
        some,
        group_names,
        title,
        None if clustering is None else clustering.silhouettes.cpu().numpy(),
    )
    plots.plot_class_distribution(counts.numpy(), out / "classes.png", every, group_names, seen.numpy(), title)


def _standing(record: Mapping[str, Any]) -> str:
    """The figures of a round in a few words."""
    parts = []
    for name, keys in (("acc", ("test", "mean")), ("tail", ("test", "tail"))):
        text = _percent(*keys)(record)
        if text != MISSING:
            parts.append(f"{name} {text} %")
    loss = _value("loss", form="{:.3f}")(record)
    return ", ".join(parts + ([f"loss {loss}"] if loss != MISSING else []))


def _by(summaries: Sequence[Summary], *keys: str) -> Iterator[tuple[dict[str, str], list[Summary]]]:
    """Runs with the same values of `keys` together, in order of first appearance."""

    def setting(summary: Summary) -> tuple[str, ...]:
        return tuple(str(summary.get(key, MISSING)) for key in keys)

    seen = list(dict.fromkeys(map(setting, summaries)))
    for values, runs in groupby(sorted(summaries, key=lambda s: seen.index(setting(s))), key=setting):
        yield dict(zip(keys, values, strict=True)), list(runs)


def _preamble(setting: Mapping[str, str]) -> list[str]:
    said = ", ".join(f"{key} {value}" for key, value in setting.items())
    return [said[0].upper() + said[1:], *([GLYPHS] if setting["data"] == "glyphs" else [])]


def _footnotes(runs: Sequence[Summary]) -> list[str]:
    return [LEGEND, *([INTERRUPTED] if any(run.get("interrupted") for run in runs) else [])]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first cell to the left, the figures to the right."""
    rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()
