"""Figures with a row for each method or run: dots of clients, a bar for a mean and its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hilora.reporting.statistics import Interval
from hilora.reporting.style import GREY, grid, new_figure

MOST_POINTS = 400  # of a row's clients; more would be a blot


def rows_figure(labels: Sequence[str], label: str) -> tuple[Figure, Axes]:
    """Axes with a row for each label, the first on top; `label` stands below."""
    figure = new_figure(7, 1.3 + 0.38 * len(labels))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(labels)), list(labels))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(label)
    grid(axes, "x")
    return figure, axes


def bar(axes: Axes, found: Interval, place: int, colour: str) -> None:
    """The mean of a row in %, with its interval."""
    if found.low is not None and found.high is not None:
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=colour, linewidth=2, zorder=3)
    axes.plot(100 * found.mean, place, marker="|", markersize=13, markeredgewidth=2.2, color=colour, zorder=3)


def draw_differences(
    axes: Axes, rows: Sequence[Sequence[float]], means: Sequence[Interval], colours: list[str]
) -> None:
    """A dot for each client's difference in points, up and down in its row so that they can be told apart; over them
    the mean with its interval; a line at no difference."""
    draws = np.random.default_rng(0)
    for place, (row, found, colour) in enumerate(zip(rows, means, colours, strict=True)):
        values = draws.permutation(100 * np.asarray(row))[:MOST_POINTS]
        heights = place + draws.uniform(-0.28, 0.28, len(values))
        axes.scatter(values, heights, s=9, color=colour, alpha=0.35, linewidths=0, zorder=2)
        bar(axes, found, place, "black")
    axes.axvline(0, color=GREY, linewidth=1)
