"""From the ledger to tables and charts: `python -m benchmarks.report`.

Writes between the markers `<!-- benchmarks -->` and `<!-- /benchmarks -->` of the README (the headline of each device)
and of docs/benchmarks.md (everything), and charts into docs/benchmarks/.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import charts
from benchmarks.figures import OURS, Comparison, Device, Shape, by_device
from benchmarks.ledger import RESULTS, read
from benchmarks.shapes import Layer

START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
TO_COME = "**No figure has been measured on a GPU yet**: CUDA figures are to come, by `make gpu-report`."
OTHERS = {
    "round": "A local epoch of many clients",
    "cohort": "A local epoch by the size of cohorts",
    "population": "The same images shared out among more clients",
    "penalty": "Orthogonality penalty, value and gradient",
    "distances": "Distances of clients",
}
LAYER_RIVALS = [name for name in charts.COLOURS if name != OURS]


def main(arguments: Sequence[str] | None = None) -> None:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=RESULTS, help="the ledger")
    parser.add_argument("--readme", type=Path, default=root / "README.md")
    parser.add_argument(
        "--docs", type=Path, default=root / "docs", help="the folder of benchmarks.md and of the charts"
    )
    given = parser.parse_args(arguments)
    try:
        devices = by_device(read(given.figures))
        if not devices:
            raise ValueError(f"{given.figures} holds no figures: run pytest benchmarks/ --benchmark-only")
        written = {
            given.readme: between_markers(given.readme, headline(devices)),
            given.docs / "benchmarks.md": between_markers(given.docs / "benchmarks.md", everything(devices)),
        }
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")
    (given.docs / "benchmarks").mkdir(exist_ok=True)
    for device in devices:
        if charts.drawable(device):
            charts.rival_bars(device, given.docs / chart(device, "rivals"))
            charts.curves(device, given.docs / chart(device, "curves"))
            charts.memory_bars(device, given.docs / chart(device, "memory"))
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")


def between_markers(path: Path, text: str) -> str:
    """A file's text with what is between its markers exchanged.

    Raises:
        ValueError: where the file has no markers.
    """
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path} needs a line {START} and a line {END}, for what is written between them")
    return f"{before}{START}\n{text}\n{END}{after}"


def headline(devices: Sequence[Device]) -> str:
    parts = []
    for device in devices:
        if not charts.drawable(device):
            continue
        shape = charts.centre(device)
        forwards, steps = (device.layers(phase)[shape] for phase in charts.PHASES)
        rows = [(name, forwards.ratio(name), steps.ratio(name)) for name in LAYER_RIVALS]
        parts += [
            f"![Rivals](docs/{chart(device, 'rivals')})",
            f"*Time of the rivals over ours, {conditions(device)}; {charts.describe(shape)}.*",
            table(["rival", "forward", "forward and backward"], [row for row in rows if row[2]]),
        ]
    return "\n\n".join([*parts, *to_come(devices)])


def everything(devices: Sequence[Device]) -> str:
    parts = to_come(devices)
    for device in devices:
        parts += [f"## {device.conditions['device']}", f"{conditions(device)}."]
        parts.append(
            "Measured for the model of cost: "
            + ", ".join(sorted({f"{f['tflops']:.3g} TFLOP/s in {dtype}" for dtype, f in rates(device).items()}))
            + f", {device.conditions['gb_per_s']:.3g} GB/s."
        )
        if charts.drawable(device):
            for name, text in (("rivals", "All rivals"), ("curves", "Along the shape"), ("memory", "Memory")):
                parts.append(f"![{text}]({chart(device, name)})")
        for phase, title in charts.PHASES.items():
            layers = device.layers(phase)
            if layers:
                parts += [f"### Adapters on q and v: {title}", layer_table(layers)]
        for op, title in OTHERS.items():
            found = {key[2]: comparison for key, comparison in device.comparisons.items() if key[0] == op}
            if found:
                parts += [f"### {title}", other_table(found)]
    return "\n\n".join(parts)


def layer_table(layers: dict[Layer, Comparison]) -> str:
    header = ["form", "width", "rows", "clients", "tiers × rank", "dtype", "ours, ms", "floor / ours", *LAYER_RIVALS]
    rows: list[list[object]] = []
    for s, found in sorted(layers.items(), key=lambda item: item[0]._replace(compiled=False)):
        form = [s.form, s.width, f"{s.rows:,}", s.groups, f"{s.tiers} × {s.rank}", s.dtype]
        rows.append([*form, *own(found), *(found.ratio(name) for name in LAYER_RIVALS)])
    return table(header, rows)


def other_table(found: dict[Shape, Comparison]) -> str:
    fields = next(iter(found))._fields
    rivals = list(dict.fromkeys(name for comparison in found.values() for name in comparison.by_rival if name != OURS))
    rows = [[*shape, *own(c), *(c.ratio(name) for name in rivals)] for shape, c in sorted(found.items())]
    return table([*fields, "ours, ms", "floor / ours", *rivals], rows)


def own(comparison: Comparison) -> list[object]:
    """Our time, and how much of it the model of cost accounts for."""
    ours, floor = comparison.median(OURS), comparison.median(OURS, "floor_ms")
    return [f"{ours:.3g}", f"{floor / ours:.0%}"] if ours and floor is not None else ["", ""]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


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
