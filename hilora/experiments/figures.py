"""The plots of a report: accuracies, paired differences of clients, accuracy against what is sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hilora.experiments.cells import Cell
from hilora.reporting.row_plot import bar, draw_differences, rows_figure
from hilora.reporting.style import BLUE, GREY, ORANGE, VERMILION, new_figure, open_frame, save


def plot_accuracies(cells: Sequence[Cell], path: Path) -> bool:
    """Each method's accuracy: a dot for every seed, the mean with its interval over clients, the published figure.

    Returns:
        Whether there was anything to draw; else there is no file.
    """
    shown = [cell for cell in cells if cell.accuracy() is not None or cell.setting.name in cell.method.paper]
    if not any(cell.trained for cell in shown):
        return False
    figure, axes = rows_figure([cell.method.label for cell in shown], "personalised accuracy, %")
    for place, cell in enumerate(shown):
        found = cell.accuracy()
        if found is not None:
            seeds = [100 * value for value in cell.by_seed("final", "mean").values()]
            axes.scatter(seeds, [place] * len(seeds), s=34, color=_colour(cell), edgecolors="white", zorder=4)
            bar(axes, found, place, _colour(cell))
        if cell.setting.name in cell.method.paper:
            paper = cell.method.paper[cell.setting.name]
            axes.scatter(paper, place, marker="D", s=36, facecolors="none", edgecolors=ORANGE, zorder=4)
    notes = "dots: seeds; bar: mean, 95 % over clients"
    if any(cell.setting.name in cell.method.paper for cell in shown):
        notes += "; diamond: published"
    return _save(figure, axes, f"{shown[0].setting.name}: {notes}", shown, path)


def plot_differences(cells: Sequence[Cell], compare: Cell, path: Path) -> bool:
    """Every client's accuracy minus its accuracy under the method compared with, and the mean difference."""
    shown = [cell for cell in cells if cell is not compare and cell.less(compare)[1] is not None]
    if not shown:
        return False
    figure, axes = rows_figure(
        [cell.method.label for cell in shown], f"accuracy minus that of {compare.method.label}, points"
    )
    rows, means = [], []
    for cell in shown:
        by_seed, found = cell.less(compare)
        assert found is not None
        rows.append([value for values in by_seed.values() for value in values])
        means.append(found)
    draw_differences(axes, rows, means, [_colour(cell) for cell in shown])
    return _save(figure, axes, f"{shown[0].setting.name}: a dot a client; bar: mean and 95 % interval", shown, path)


def plot_traffic(cells: Sequence[Cell], path: Path) -> bool:
    """Accuracy against the bytes that a client sends and receives in a round."""
    points = []
    for cell in cells:
        up, down, found = (
            cell.over_seeds("communication", "up"),
            cell.over_seeds("communication", "down"),
            cell.accuracy(),
        )
        if up and down and found:
            points.append((100 * found.mean, (up.mean + down.mean) / 1e6, cell))
    if not points:
        return False
    points.sort(key=lambda point: point[0])
    figure = new_figure(7, max(3.0, 1.4 + 0.26 * len(points)))
    axes = figure.add_subplot()
    heights = _apart([height for height, _, _ in points])
    for (y, x, cell), height in zip(points, heights, strict=True):
        axes.scatter(x, y, s=40, color=_colour(cell), zorder=3)
        axes.annotate(
            cell.method.label,
            (x, y),
            (1.03, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "alpha": 0.6},
        )
    axes.set_xlim(left=0)
    axes.set_ylim(min(heights[0], points[0][0]) - 2, max(heights[-1], points[-1][0]) + 2)
    axes.set(xlabel="MB a client sends and receives in a round", ylabel="personalised accuracy, %")
    return _save(
        figure, axes, f"{cells[0].setting.name}: accuracy against traffic", [cell for _, _, cell in points], path
    )


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending places of labels near the given ones, far enough apart to be read."""
    gap = max(heights[-1] - heights[0], 4) / len(heights)
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + gap) if places else height)
    shift = (sum(places) - sum(heights)) / len(heights)
    return [place - shift for place in places]


def _colour(cell: Cell) -> str:
    return GREY if cell.method.reference else BLUE if cell.complete else VERMILION


def _save(figure: Figure, axes: Axes, title: str, cells: Sequence[Cell], path: Path) -> bool:
    notes = ["orange: not all seeds are done"] if not all(cell.complete for cell in cells) else []
    notes += ["grey: for reference"] if any(cell.method.reference for cell in cells) else []
    figure.suptitle("\n".join([title, *([", ".join(notes)] if notes else [])]), fontsize=9.5)
    open_frame(axes)
    save(figure, path)
    return True
