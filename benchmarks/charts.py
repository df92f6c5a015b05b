"""Charts of the figures: bars for all rivals, curves over the shape, memory."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.figures import FROZEN, OURS, Comparison, Device
from benchmarks.shapes import Layer, layers
from hilora.reporting.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

COLOURS = {
    OURS: BLUE,
    "hilora, whole qkv": SKY,
    "PEFT": VERMILION,
    "PEFT, compiled": ORANGE,
    "stacked addmm": GREEN,
    "merged + 1 LoRA": PURPLE,
    FROZEN: GREY,
}
PHASES = {"forward": "forward", "step": "forward and backward"}
CURVES = {
    "rows": "rows (images × tokens)",
    "rank": "rank of each tier",
    "tiers": "tiers",
    "groups": "clients in a batch",
}


def rival_bars(device: Device, path: Path) -> None:
    """Time of each rival over that of the frozen layer, at the first of the shapes."""
    figure = _figure(10, 3.4, f"Adapters on q and v against the frozen layer\n{describe(centre(device))}")
    for axes, (phase, title) in zip(figure.subplots(1, 2, sharey=True), PHASES.items(), strict=True):
        comparison = device.layers(phase)[centre(device)]
        found = {name: comparison.ratio(name, to=FROZEN) for name in COLOURS}
        _bars(axes, {name: ratio.value for name, ratio in found.items() if ratio}, "{:.2f}")
        axes.axvline(1, color=GREY, linewidth=0.9, linestyle="--")
        axes.set(title=title, xlabel="time over the frozen layer's")
    figure.savefig(path)


def memory_bars(device: Device, path: Path) -> None:
    """The most memory that a step holds, at the first of the shapes."""
    figure = _figure(7, 3.2, f"Memory of forward and backward beyond weights and input\n{describe(centre(device))}")
    comparison = device.layers("step")[centre(device)]
    found = {name: comparison.median(name, "peak_mb") for name in COLOURS}
    axes = figure.subplots()
    _bars(axes, {name: value for name, value in found.items() if value is not None}, "{:.1f}")
    axes.set_xlabel("MB at the fullest")
    figure.savefig(path)


def curves(device: Device, path: Path) -> None:
    """Time over the frozen layer's, along each of the shape's dimensions."""
    figure = _figure(10, 7, f"Forward and backward, one thing changed at a time\n{describe(centre(device))}")
    for axes, (field, label) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        along = _along(device, field)
        for name, colour in COLOURS.items():
            ratios = {x: comparison.ratio(name, to=FROZEN) for x, comparison in along.items()}
            points = [(x, ratio.value) for x, ratio in ratios.items() if ratio]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=name)
        if field != "tiers":
            axes.set_xscale("log", base=2)
        axes.set_xticks(list(along), [f"{x:,}" for x in along])
        axes.minorticks_off()
        axes.set(xlabel=label, ylabel="time over the frozen layer's")
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_ylim(bottom=0)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def centre(device: Device) -> Layer:
    """The shape that the others are variations of."""
    return layers(str(device.conditions["scale"]))[0]


def drawable(device: Device) -> bool:
    """Whether what all charts start from was measured; a run that was cut short may lack it."""
    found = (device.layers(phase).get(centre(device)) for phase in PHASES)
    return all(comparison and {OURS, FROZEN} <= set(comparison.by_rival) for comparison in found)


def describe(shape: Layer) -> str:
    clients = f", {shape.groups} clients" if shape.groups > 1 else ""
    tiers = f"{shape.tiers} tiers" if shape.tiers > 1 else "1 tier"
    return (
        f"width {shape.width}, {shape.rows:,} rows{clients}, {tiers} of rank {shape.rank}, {shape.dtype}, {shape.form}"
    )


def _along(device: Device, field: str) -> dict[int, Comparison]:
    """Comparisons that differ from the centre in this field alone."""

    def rest(shape: Layer) -> Layer:
        return shape._replace(compiled=False, **{field: 0})  # type: ignore[arg-type]

    found = {s: c for s, c in device.layers("step").items() if rest(s) == rest(centre(device))}
    return {getattr(shape, field): found[shape] for shape in sorted(found, key=lambda shape: getattr(shape, field))}


def _bars(axes: Axes, values: dict[str, float], form: str) -> None:
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color=[COLOURS[name] for name in names])
    axes.bar_label(bars, [form.format(values[name]) for name in names], padding=3, fontsize=9)
    axes.set_xlim(0, 1.15 * max(values.values()))
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure
