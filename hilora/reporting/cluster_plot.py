"""The picture of the clusters: distances of clients, the evidence that chose K, clusters against true groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hilora.files import PathLike
from hilora.reporting.style import BLUE, GREY, HEAT, PALETTE, SKY, VERMILION, new_figure, open_frame, save

Array = NDArray[Any]


def plot_clusters(
    distances: Array | None,
    labels: Array | None,
    eigengaps: Array | None,
    k: int,
    path: PathLike,
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
        return message(new_figure(9, 4.8, title), "no clusters were formed", path)
    groups = np.zeros_like(labels) if true_groups is None else true_groups
    names = group_labels(groups, group_names) if true_groups is not None else ["clients"]
    gaps = np.array([]) if eigengaps is None else eigengaps

    wide, tall = distances is not None, len(gaps) > 0
    height = 4.4 + 0.17 * len(names)
    figure = new_figure(height + 7 if wide else 6.5, height, title)
    columns = figure.add_gridspec(1, 2 if wide else 1, width_ratios=[height + 0.9, 6.1] if wide else None)
    rows = columns[-1].subgridspec(2 if tall else 1, 1, height_ratios=[2, 0.8 + 0.22 * len(names)] if tall else None)
    if distances is not None:
        _distance_panel(figure.add_subplot(columns[0]), distances, labels, groups if true_groups is not None else None)
    if tall:
        _evidence_panel(figure.add_subplot(rows[0]), gaps, silhouettes, k)
    _contingency_panel(figure.add_subplot(rows[-1]), labels, groups, names, k, coloured=true_groups is not None)
    save(figure, path)


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
    open_frame(axes)
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


def group_labels(groups: Array, names: Sequence[str]) -> list[str]:
    """Names of the groups, shortened, or their numbers."""
    found = list(names) or [str(group) for group in range(int(groups.max()) + 1)]
    return [name if len(name) <= 30 else name[:29] + "…" for name in found]


def _colours(n: int) -> Array:
    """RGB `[n, 3]`: the palette, then its lighter and its darker shades."""
    base = np.array([to_rgb(colour) for colour in PALETTE])
    shades = np.concatenate([base, 0.5 + 0.5 * base, 0.55 * base])
    return shades[np.arange(n) % len(shades)]


def message(figure: Figure, text: str, path: PathLike) -> None:
    """A picture that says why there is none."""
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=15, color=GREY)
    save(figure, path)
