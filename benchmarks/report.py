"""From the ledger to tables and charts: `python -m benchmarks.report`.

Writes between two pairs of markers of docs/benchmarks.md, `<!-- headline -->` and `<!-- /headline -->` (of each device
the shape in the middle) and `<!-- benchmarks -->` and `<!-- /benchmarks -->` (all), and charts into docs/benchmarks/.
Where there is no such page, it makes one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.charts import Drawn
from benchmarks.figures import OURS, Comparison, Device, by_device
from benchmarks.ledger import RESULTS, read
from benchmarks.operations import Operation, left_out, operations
from hilora.files import write_text
from hilora.reporting.document import between
from hilora.reporting.tables import MISSING, Row, Table

HEADLINE = "<!-- headline -->", "<!-- /headline -->"
EVERYTHING = "<!-- benchmarks -->", "<!-- /benchmarks -->"
EMPTY = "\n".join(("# Benchmarks", *HEADLINE, *EVERYTHING, ""))
PICTURES = (
    ("rivals", "Time of each rival over that of the frozen layer, at the shape in the middle"),
    ("curves", "Time of each rival over that of the frozen layer, along rows, ranks, tiers and clients"),
    ("memory", "Memory that a step of each rival allocates beyond weights and input"),
)
DRAWS = find_spec("matplotlib") is not None
TO_COME = "**No figure has been measured on a GPU yet**: CUDA figures are to come, by `make gpu-report`."


def main(arguments: Sequence[str] | None = None) -> None:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=RESULTS, help="the ledger")
    parser.add_argument(
        "--docs", type=Path, default=root / "docs", help="the folder of benchmarks.md and of the charts"
    )
    given = parser.parse_args(arguments)
    page = given.docs / "benchmarks.md"
    try:
        devices = by_device(read(given.figures))
        if not devices:
            raise ValueError(f"{given.figures} holds no figures: run pytest benchmarks/ --benchmark-only")
        if not page.exists():
            write_text(page, EMPTY)
        for markers in (HEADLINE, EVERYTHING):  # fails before anything is written
            between(page, *markers, "")
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")
    for device in devices:
        drawn = Drawn(device)
        if drawn.whole and DRAWS:
            drawn.rival_bars(given.docs / chart(device, "rivals"))
            drawn.curves(given.docs / chart(device, "curves"))
            drawn.memory_bars(given.docs / chart(device, "memory"))
    for markers, text in ((HEADLINE, headline(devices)), (EVERYTHING, everything(devices))):
        write_text(page, between(page, *markers, text))


def headline(devices: Sequence[Device]) -> str:
    parts = []
    for device in devices:
        drawn = Drawn(device)
        if not drawn.whole:
            continue
        phases, names = drawn.operation.phases, [name for name in drawn.charts.colours if name != OURS]
        ratios = [(name, [drawn.at_centre(phase).ratio(name) for phase in phases]) for name in names]
        rows = [[name, *found] for name, found in ratios if found[-1]]
        parts += [
            f"*Time of the rivals over ours, {conditions(device)}; {drawn.charts.describe(drawn.centre)}.*",
            table(["rival", *phases.values()], rows),
        ]
    return "\n\n".join([*to_come(devices), *parts])


def everything(devices: Sequence[Device]) -> str:
    parts = []
    for device in devices:
        parts += [f"## {device.conditions['device']}", f"{conditions(device)}."]
        parts.append(
            "Measured for the model of cost: "
            + ", ".join(sorted({f"{f['tflops']:.3g} TFLOP/s in {dtype}" for dtype, f in rates(device).items()}))
            + f", {device.conditions['gb_per_s']:.3g} GB/s."
        )
        if Drawn(device).whole and DRAWS:
            for name, text in PICTURES:
                parts.append(f"![{text}]({chart(device, name)})")
        for name, operation in operations().items():
            for phase, title in operation.phases.items():
                found = device.of(name, phase)
                if found:
                    parts += [f"### {operation.title}{title and f': {title}'}", comparisons(operation, found)]
    if lacking := left_out():
        each = (f"{operation} ({package})" for operation, package in lacking.items())
        parts.append(f"Left out, each for want of a package: {', '.join(each)}.")
    return "\n\n".join(parts)


def comparisons(operation: Operation, found: Mapping[Any, Comparison]) -> str:
    """A row for each shape: our time, the floor, and the rivals' times over ours."""
    measured = dict.fromkeys(name for comparison in found.values() for name in comparison.by_rival)
    rivals = [name for name in (operation.charts.colours if operation.charts else measured) if name != OURS]
    rows = [
        [*operation.columns(shape).values(), *own(one), *(one.ratio(name) for name in rivals)]
        for shape, one in sorted(found.items())
    ]
    return table([*operation.columns(next(iter(found))), "ours, ms", "floor / ours", *rivals], rows)


def own(comparison: Comparison) -> list[object]:
    """Our time, and how much of it the model of cost accounts for."""
    ours, floor = comparison.median(OURS), comparison.median(OURS, "floor_ms")
    return [f"{ours:.3g}", f"{floor / ours:.0%}"] if ours and floor is not None else ["", ""]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = (tuple(MISSING if cell is None else str(cell) for cell in row) for row in rows)
    return Table(tuple(header), tuple(map(Row, cells))).markdown()


def conditions(device: Device) -> str:
    c = device.conditions
    runs = f"up to {device.runs} runs, whose range stands beside the median" if device.runs > 1 else "one run"
    versions = ", ".join(f"{name} {c[name]}" for name in ("torch", "triton", "peft", "hilora"))
    return f"{c['device']}, {versions}, {c['date']}, {runs}"


def rates(device: Device) -> dict[str, dict[str, float]]:
    return {
        figure.get("dtype", "float32"): figure
        for comparison in device.comparisons.values()
        for by_run in comparison.by_rival.values()
        for figure in by_run.values()
    }


def to_come(devices: Sequence[Device]) -> list[str]:
    return [] if any(device.conditions["scale"] == "cuda" for device in devices) else [TO_COME]


def chart(device: Device, name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", str(device.conditions["device"]).lower()).strip("-")
    return f"benchmarks/{slug}-{name}.png"


if __name__ == "__main__":
    main()
