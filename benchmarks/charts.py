"""Charts of the figures: bars for all rivals, curves over the shape, memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import OURS, Comparison, Device
from benchmarks.operations import Charts, Operation, operations
from hilora.reporting.style import GREY, grid, new_figure, open_frame, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Drawn:
    """The operation that is drawn, as a device does it.

    Attributes:
        centre: the shape that the others are variations of.
    """

    def __init__(self, device: Device) -> None:
        self.name, self.operation, self.charts = charted()
        self.device = device
        self.centre = self.operation.shapes(str(device.conditions["scale"]))[0]
        self.label = f"time over the {self.charts.limit}'s"

    @property
    def whole(self) -> bool:
        """Whether what all charts start from was measured; a run that was cut short may lack it."""
        found = (self.device.of(self.name, phase).get(self.centre) for phase in self.operation.phases)
        return all(comparison and {OURS, self.charts.limit} <= set(comparison.by_rival) for comparison in found)

    def at_centre(self, phase: str) -> Comparison:
        return self.device.of(self.name, phase)[self.centre]

    def rival_bars(self, path: Path) -> None:
        """Time of each rival over that of the limit, at the first of the shapes."""
        figure = self._figure(10, 3.4, f"{self.operation.title} against the {self.charts.limit}")
        phases = self.operation.phases
        for axes, (phase, title) in zip(figure.subplots(1, len(phases), sharey=True), phases.items(), strict=True):
            comparison = self.at_centre(phase)
            found = {name: comparison.ratio(name, to=self.charts.limit) for name in self.charts.colours}
            self._bars(axes, {name: ratio.value for name, ratio in found.items() if ratio}, "{:.2f}")
            axes.axvline(1, color=GREY, linewidth=0.9, linestyle="--")
            axes.set(title=title, xlabel=self.label)
        save(figure, path)

    def memory_bars(self, path: Path) -> None:
        """The most memory that a step holds, at the first of the shapes."""
        figure = self._figure(7, 3.2, "Memory of forward and backward beyond weights and input")
        comparison = self.at_centre("step")
        found = {name: comparison.median(name, "peak_mb") for name in self.charts.colours}
        axes = figure.subplots()
        self._bars(axes, {name: value for name, value in found.items() if value is not None}, "{:.1f}")
        axes.set_xlabel("MB at the fullest")
        save(figure, path)

    def curves(self, path: Path) -> None:
        """Time over the limit's, along each of the shape's dimensions."""
        figure = self._figure(10, 7, "Forward and backward, one thing changed at a time")
        for axes, (field, label) in zip(figure.subplots(2, 2).flat, self.charts.curves.items(), strict=True):
            along = self._along(field)
            for name, colour in self.charts.colours.items():
                ratios = {x: comparison.ratio(name, to=self.charts.limit) for x, comparison in along.items()}
                points = [(x, ratio.value) for x, ratio in ratios.items() if ratio]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=name)
            if field != "tiers":
                axes.set_xscale("log", base=2)
            axes.set_xticks(list(along), [f"{x:,}" for x in along])
            axes.minorticks_off()
            axes.set(xlabel=label, ylabel=self.label)
            grid(axes, "y")
            axes.set_ylim(bottom=0)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
        save(figure, path)

    def _along(self, field: str) -> dict[int, Comparison]:
        """Comparisons that differ from the centre in this field alone."""

        def rest(shape: Any) -> Any:
            return shape._replace(**{**self.charts.aside, field: 0})

        found = {s: c for s, c in self.device.of(self.name, "step").items() if rest(s) == rest(self.centre)}
        return {getattr(shape, field): found[shape] for shape in sorted(found, key=lambda shape: getattr(shape, field))}

    def _bars(self, axes: Axes, values: Mapping[str, float], form: str) -> None:
        names = list(values)[::-1]
        colours = [self.charts.colours[name] for name in names]
        bars = axes.barh(names, [values[name] for name in names], color=colours)
        axes.bar_label(bars, [form.format(values[name]) for name in names], padding=3, fontsize=9)
        axes.set_xlim(0, 1.15 * max(values.values()))
        open_frame(axes)

    def _figure(self, width: float, height: float, title: str) -> Figure:
        return new_figure(width, height, f"{title}\n{self.charts.describe(self.centre)}", size=11)


def charted() -> tuple[str, Operation, Charts]:
    """The operation that is drawn."""
    return next((name, one, one.charts) for name, one in operations().items() if one.charts is not None)
