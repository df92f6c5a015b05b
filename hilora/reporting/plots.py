"""The three pictures of a run: accuracy over the rounds, the clusters, and who has which classes.

Figures are drawn through matplotlib's object interface on the Agg canvas: no window, no global state. Import this
module where a picture is due, not with the library: matplotlib takes a second to load.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hilora.reporting.metrics import write_bytes

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
GREY = "#666666"
HEAT = "YlGnBu"

Path = str | os.PathLike[str]
Array = NDArray[Any]


def plot_accuracy(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Test accuracy over the rounds: the mean over clients, its spread, the tail; validation beside it.

    Args:
        records: the lines of `metrics.jsonl`; a round without a measurement leaves a gap of no width.
        path: the PNG to write.
        title: stands above the figure.
    """
    figure = _figure(9, 4.8, title)
    if not records:
        return _message(figure, "no round has been trained", path)
    axes = figure.add_subplot()
    rounds = np.array([record["round"] for record in records])
    marker = "o" if len(rounds) <= 40 else None

    def line(split: str, value: str, label: str, **style: Any) -> None:
        y = _series(records, split, value)
        known = ~np.isnan(y)
        if known.any():
            axes.plot(rounds[known], y[known], label=label, marker=marker, **style)

    mean, std = _series(records, "test", "mean"), _series(records, "test", "std")
    known = ~np.isnan(mean + std)
    low, high = np.clip(mean - std, 0, 100)[known], np.clip(mean + std, 0, 100)[known]
    axes.fill_between(rounds[known], low, high, color=BLUE, alpha=0.15, linewidth=0, label="mean ± std over clients")
    line("test", "mean", "mean (test)", color=BLUE, linewidth=2.2, markersize=4)
    line("test", "tail", "worst tenth of clients (test)", color=VERMILION, linewidth=1.8, markersize=3.5)
    line("val", "mean", "mean (validation)", color=GREY, linewidth=0.9, markersize=2)
    axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    _stages(axes, records)
    axes.set(xlabel="round", ylabel="accuracy of clients (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_clusters(
    distances: Array | None,
    labels: Array | None,
    eigengaps: Array | None,
    k: int,
    path: Path,
    true_groups: Array | None = None,
    group_names: Sequence[str] = (),
    title: str = "",
    silhouettes: Array | None = None,
) -> None:
    """The clients' subspace distances ordered by cluster, the evidence that chose K, and clusters against true groups.

    Args:
        distances: `[n, n]`, or None where clusters came about without them: then that panel is left out.
        labels: int `[n]`, each client's cluster; None where none were formed, which the picture then says.
        eigengaps: `[m]`, the gap after the first, second, ... eigenvalue; None or empty leaves the panel out.
        k: the number of clusters.
        path: the PNG to write.
        true_groups: int `[n]`, each client's true group where it is known.
        group_names: names of the groups; their numbers stand in where it is empty.
        title: stands above the figure.
        silhouettes: `[m]`, of the groups for K = 2, 3, …; None or empty where the eigengaps chose K.
    """
    if labels is None or not len(labels):
        return _message(_figure(9, 4.8, title), "no clusters were formed", path)
    groups = np.zeros_like(labels) if true_groups is None else true_groups
    names = _names(groups, group_names) if true_groups is not None else ["clients"]
    gaps = np.array([]) if eigengaps is None else eigengaps

    wide, tall = distances is not None, len(gaps) > 0
    height = 4.4 + 0.17 * len(names)
    figure = _figure(height + 7 if wide else 6.5, height, title)
    columns = figure.add_gridspec(1, 2 if wide else 1, width_ratios=[height + 0.9, 6.1] if wide else None)
    rows = columns[-1].subgridspec(2 if tall else 1, 1, height_ratios=[2, 0.8 + 0.22 * len(names)] if tall else None)
    if distances is not None:
        _distance_panel(figure.add_subplot(columns[0]), distances, labels, groups if true_groups is not None else None)
    if tall:
        _evidence_panel(figure.add_subplot(rows[0]), gaps, silhouettes, k)
    _contingency_panel(figure.add_subplot(rows[-1]), labels, groups, names, k, coloured=true_groups is not None)
    _save(figure, path)


def plot_class_distribution(
    counts: Array,
    path: Path,
    true_groups: Array | None = None,
    group_names: Sequence[str] = (),
    seen: Array | None = None,
    title: str = "",
) -> None:
    """Training images of every class at every client, as a heat map ordered by true group.

    Args:
        counts: int `[n, classes]`.
        path: the PNG to write.
        true_groups: int `[n]`, or None; where known, clients stand by group, and a class by the group with most of it.
        group_names: names of the groups; their numbers stand in where it is empty.
        seen: bool `[n]`, False for the clients held out of the training; None if none are.
        title: stands above the figure.
    """
    used = np.flatnonzero(counts.any(axis=0) | ~counts.any())  # classes that no client has are left out
    counts = counts[:, used]
    n, classes = counts.shape
    seen = np.ones(n, dtype=bool) if seen is None else seen.astype(bool)
    groups = np.zeros(n, dtype=int) if true_groups is None else true_groups
    names = _names(groups, group_names) if true_groups is not None else []
    clients = np.lexsort((np.arange(n), ~seen, groups)) if names else np.arange(n)
    owned = np.stack([counts[groups == g].sum(axis=0) for g in range(groups.max() + 1)])
    order = np.argsort(owned.argmax(axis=0), kind="stable")

    height = 1.9 + min(max(0.085 * n, 0.19 * len(names), 1.2), 9)
    figure = _figure(min(max(4.5 + 0.07 * classes, 7), 12), height, title)
    axes = figure.add_subplot()
    shown = np.ma.masked_less(counts[np.ix_(clients, order)], 1)
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, counts.max()))
    image = axes.imshow(shown, cmap=HEAT, norm=norm, aspect="auto", interpolation="nearest")
    figure.colorbar(image, cax=axes.inset_axes((1.04, 0, 0.025, 1)), label="training images")

    borders = np.flatnonzero(np.diff(groups[clients])) + 0.5
    axes.hlines(borders, -0.5, classes - 0.5, color=GREY, linewidth=0.5)
    if names:
        present = np.unique(groups)
        centres = [np.flatnonzero(groups[clients] == g).mean() for g in present]
        axes.set_yticks(centres, [names[g] for g in present], fontsize=8)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("clients by true group" if names else "client")
    if classes <= 25:
        axes.set_xticks(range(classes), [str(used[c]) for c in order], fontsize=8)
    elif names:
        axes.set_xticks([])
    axes.set_xlabel("class, ordered by the group that has most of it" if names else "class")
    unseen = np.flatnonzero(~seen[clients])
    if len(unseen):
        x = np.full(len(unseen), 1.015)
        place = axes.get_yaxis_transform()
        marks = axes.scatter(x, unseen, marker="<", s=16, color=VERMILION, transform=place, clip_on=False, linewidths=0)
        figure.legend([marks], ["unseen client"], loc="outside lower right", frameon=False)
    _save(figure, path)


def _distance_panel(axes: Axes, distances: Array, labels: Array, groups: Array | None) -> None:
    n = len(labels)
    order = np.lexsort((np.arange(n), labels if groups is None else groups, labels))
    apart = distances[~np.eye(n, dtype=bool)]  # the zero diagonal would eat up the colours: only differences matter
    low, high = (apart.min(), apart.max()) if n > 1 else (0.0, 1.0)
    high = high if high > low else low + 1e-6
    image = axes.imshow(distances[np.ix_(order, order)], cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.035, 1)), label="subspace distance")

    borders = np.flatnonzero(np.diff(labels[order])) + 0.5
    for border in borders:
        axes.axhline(border, color="white", linewidth=1.2)
        axes.axvline(border, color="white", linewidth=1.2)
    edges = np.concatenate([[-0.5], borders, [n - 0.5]])
    centres = (edges[1:] + edges[:-1]) / 2
    ticks: list[int] = []
    for i in range(len(centres)):  # the numbers of the clusters, as far as there is room
        if not ticks or centres[i] - centres[ticks[-1]] > n / 45:
            ticks.append(i)
    axes.set_xticks(centres[ticks], np.unique(labels)[ticks], fontsize=7)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set(title="Distances, ordered by cluster", xlabel="cluster")
    if groups is None:
        axes.set_ylabel("client")
        return
    strip = axes.inset_axes((-0.055, 0, 0.035, 1))
    strip.imshow(_colours(groups.max() + 1)[groups[order]][:, None], aspect="auto", interpolation="nearest")
    strip.set(xticks=[], yticks=[], ylabel="client, coloured by true group")


def _evidence_panel(axes: Axes, gaps: Array, silhouettes: Array | None, k: int) -> None:
    gaps = gaps[1 : max(30, k + 5)]  # the gap after the first eigenvalue is always the largest, and hides the others
    numbers = np.arange(2, len(gaps) + 2)
    axes.bar(numbers, gaps, color=[VERMILION if number == k else SKY for number in numbers], width=0.75)
    axes.set(title=f"Eigengaps: K = {k}", xlabel="number of clusters", ylabel="eigengap (bars)")
    axes.set_xlim(1.4, max(len(gaps), 4) + 1.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.spines[["top", "right"]].set_visible(False)
    if silhouettes is not None and len(silhouettes):
        axes.set_title(f"Eigengaps and silhouettes: K = {k}")
        scores = axes.twinx()
        scores.plot(np.arange(2, len(silhouettes) + 2), silhouettes, color=BLUE, marker="o", markersize=4)
        scores.set_ylabel("silhouette (line)")
        scores.set_ylim(min(0.0, silhouettes.min()), max(0.05, 1.15 * silhouettes.max()))
        scores.spines["top"].set_visible(False)


def _contingency_panel(axes: Axes, labels: Array, groups: Array, names: Sequence[str], k: int, coloured: bool) -> None:
    """Clients of each group (row) in each cluster (column)."""
    clusters = max(k, int(labels.max()) + 1)
    table = np.zeros((len(names), clusters), dtype=int)
    np.add.at(table, (groups, labels), 1)
    axes.imshow(np.ma.masked_less(table, 1), cmap=HEAT, vmin=0, vmax=table.max() * 1.3, aspect="auto")
    if clusters <= 30 and len(names) <= 30:
        for row, column in zip(*np.nonzero(table), strict=True):
            colour = "white" if table[row, column] > 0.75 * table.max() else "black"
            axes.text(column, row, str(table[row, column]), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(np.arange(clusters)[:: 1 + clusters // 30])
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=8 if clusters <= 15 else 7, length=0)
    axes.set(title="Clients by true group and cluster" if coloured else "Clients by cluster", xlabel="cluster")
    if coloured:
        strip = axes.inset_axes((-0.035, 0, 0.025, 1))
        strip.imshow(_colours(len(names))[:, None], aspect="auto", interpolation="nearest")
        strip.set_xticks([])
        strip.set_yticks(range(len(names)), names, fontsize=8)
        strip.tick_params(length=0)
        axes.set_yticks([])


def _stages(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """A dashed line between stages and their names above the axes, in two rows where they are close."""
    first, last = axes.get_xlim()
    reach = [first, first]  # where the names of the lower and of the upper row end
    for stage, group in groupby(records, key=lambda record: str(record["stage"])):
        rounds = [record["round"] for record in group]
        start, centre = rounds[0] - 0.5, (rounds[0] + rounds[-1]) / 2
        if start > first:
            axes.axvline(start, color=GREY, linestyle="--", linewidth=0.9)
        half = (len(stage) + 1) * 0.005 * (last - first)  # of a name's width, in rounds
        centre = min(max(centre, first + half), last - half)
        row = 0 if centre - half >= reach[0] else 1
        reach[row] = centre + half
        place = axes.get_xaxis_transform()
        axes.text(centre, 1.02 + 0.05 * row, stage, transform=place, ha="center", va="bottom", color=GREY)


def _series(records: Sequence[Mapping[str, Any]], split: str, value: str) -> Array:
    """`[rounds]` in percent, NaN where a round has no such measurement."""
    found = [(record.get(split) or {}).get(value) for record in records]
    return np.array([np.nan if x is None else 100 * x for x in found])


def _names(groups: Array, names: Sequence[str]) -> list[str]:
    found = list(names) or [str(group) for group in range(int(groups.max()) + 1)]
    return [name if len(name) <= 30 else name[:29] + "…" for name in found]


def _colours(n: int) -> Array:
    """RGB `[n, 3]`: the palette, then its lighter and its darker shades."""
    base = np.array([to_rgb(colour) for colour in (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW)])
    shades = np.concatenate([base, 0.5 + 0.5 * base, 0.55 * base])
    return shades[np.arange(n) % len(shades)]


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    return figure


def _message(figure: Figure, text: str, path: Path) -> None:
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=15, color=GREY)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
