"""Put runs side by side: their figures, in which settings they differ, and the differences of their clients to those of
the first one, paired client by client and seed by seed, with a plot.

    hilora compare runs/demo/hilora runs/demo/fedit --out runs/demo/comparison
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hilora.errors import InvalidValueError
from hilora.federated.data.partitions import settings as partition_settings
from hilora.files import plain, write_json, write_text
from hilora.reporting.comparison import comparison_markdown, comparison_text
from hilora.reporting.document import markdown
from hilora.reporting.progress import ending, say
from hilora.reporting.statistics import BySeed, Interval, differences, interval
from hilora.reporting.summary import read_summary
from hilora.reporting.tables import MISSING, Row, Table

ALIKE = ("data", "backbone", "partition")
PASSED = ("out", "resume", "strategy", "seed")  # arguments that say nothing of how a run was trained
PLOT = "differences.png"
Summaries = Mapping[str, Sequence[Mapping[str, Any]]]


def parser(prog: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, the first compared with")
    found.add_argument("--out", type=Path, help=f"folder for comparison.md, comparison.json and {PLOT} (none)")
    found.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return found


def labelled(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """The summaries of runs, those that differ in the seed alone together, by what tells them from the others.

    Raises:
        MissingFileError, FileError: a folder has no summary that can be read.
        InvalidValueError: two runs are the same.
    """
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for folder in folders:
        summary = read_summary(folder / "summary.json" if folder.is_dir() else folder)
        same = {name: value for name, value in _settings(summary).items() if name != "seed"}
        found.setdefault(json.dumps(plain(same), sort_keys=True), []).append((folder, summary))
    for runs in found.values():
        seeds = [summary["seed"] for _, summary in runs]
        if len(set(seeds)) < len(seeds):
            raise InvalidValueError(f"{runs[0][0]} and {runs[1][0]} are the same run, of seed {seeds[0]}: give one")
    names = [runs[0][1]["strategy"] for runs in found.values()]
    labels = [
        name if names.count(name) == 1 else f"{name} ({runs[0][0]})"
        for name, runs in zip(names, found.values(), strict=True)
    ]
    return {label: [summary for _, summary in runs] for label, runs in zip(labels, found.values(), strict=True)}


def _settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What decided a run."""
    asked = {name: value for name, value in summary.get("arguments", {}).items() if name not in PASSED}
    return {**asked, **summary.get("config", {}), **{name: summary[name] for name in ("strategy", *ALIKE, "seed")}}


def _population(summary: Mapping[str, Any]) -> list[Any]:
    """What must be equal for the clients of two runs of one seed to be the same ones."""
    asked = summary.get("arguments", {})
    given = [asked.get(name) for name in ("classes", "clients_per_domain", *partition_settings())]
    return [*(summary[name] for name in ALIKE), *given]


def clients(runs: Sequence[Mapping[str, Any]]) -> BySeed:
    """The test accuracy of each client at the end, by seed and id."""
    found = {}
    for run in runs:
        each = run.get("per_client") or {}
        pairs = zip(each.get("ids", ()), each.get("test", ()), strict=False)
        found[run["seed"]] = {client: value for client, value in pairs if value is not None}
    return found


def paired(by_label: Summaries) -> dict[str, tuple[list[float], Interval]]:
    """The differences of the clients of each run to those of the first, with their interval; of runs that have clients
    in common with it."""
    (_, first), *others = by_label.items()
    found = {}
    for label, runs in others:
        if _population(runs[0]) == _population(first[0]):
            by_seed = differences(clients(runs), clients(first))
            mean = interval(list(by_seed.values()))
            if mean is not None:
                found[label] = ([value for values in by_seed.values() for value in values], mean)
    return found


def differing(by_label: Summaries) -> Table | None:
    """The settings in which runs differ, None where there are none."""
    settings = [_settings(runs[0]) for runs in by_label.values()]
    names = dict.fromkeys(name for one in settings for name in one if name not in ("strategy", "seed"))
    rows = []
    for name in names:
        values = [plain(one[name]) if name in one else MISSING for one in settings]
        known = [value for value in values if value != MISSING]
        if any(value != known[0] for value in known):
            rows.append(Row((name, *(value if isinstance(value, str) else json.dumps(value) for value in values))))
    return Table(("setting", *by_label), tuple(rows)) if rows else None


def difference_table(by_label: Summaries, found: Mapping[str, tuple[list[float], Interval]]) -> Table:
    """Mean differences in points, with their 95 % intervals over clients."""
    rows = []
    for label, (values, mean) in found.items():
        ends = (MISSING, MISSING) if mean.low is None or mean.high is None else tuple(map(_points, mean[1:]))
        rows.append(Row((label, _points(mean.mean), *ends, f"{len(values)}")))
    return Table((f"minus {next(iter(by_label))}", "points", "from", "to", "clients"), tuple(rows))


def _points(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:+.1f}".replace("-", "−")


def draw(by_label: Summaries, found: Mapping[str, tuple[list[float], Interval]], path: Path) -> None:
    """Every client's difference, a row a run."""
    from hilora.reporting.row_plot import draw_differences, rows_figure  # loads matplotlib
    from hilora.reporting.style import BLUE, open_frame, save

    first = next(iter(by_label))
    figure, axes = rows_figure(list(found), f"accuracy minus that of {first}, points")
    values, means = zip(*found.values(), strict=True)
    draw_differences(axes, values, means, [BLUE] * len(found))
    figure.suptitle("a dot a client; bar: mean and 95 % interval", fontsize=9.5)
    open_frame(axes)
    save(figure, path)


def main(arguments: Sequence[str] | None = None, prog: str = "hilora compare") -> int:
    args = parser(prog).parse_args(arguments)

    def work() -> int:
        by_label = labelled(args.runs)
        found, settings = paired(by_label), differing(by_label)
        summaries = [run for runs in by_label.values() for run in runs]
        tables = [*([difference_table(by_label, found)] if found else []), *([settings] if settings else [])]
        if args.out is not None:
            parts = [comparison_markdown(summaries), markdown(tables, "")]
            if found:
                draw(by_label, found, args.out / PLOT)
                parts.append(f"![Differences of the clients]({PLOT})")
            write_text(args.out / "comparison.md", "\n\n".join(parts) + "\n")
            write_json(args.out / "comparison.json", summaries)
        if args.json:
            rows = {label: {**mean._asdict(), "clients": len(values)} for label, (values, mean) in found.items()}
            say(json.dumps(plain({"runs": summaries, "differences": rows})))
        else:
            say("\n\n".join([comparison_text(summaries), *(table.text() for table in tables)]))
            if args.out is not None:
                say(f"\nfiles: {args.out}")
        return 0

    return ending(work)
