"""The three pictures of a run: accuracy over the rounds, the clusters, and who has which classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hilora.files import PathLike
from hilora.reporting.cluster_plot import Array, group_labels, message, plot_clusters
from hilora.reporting.style import BLUE, GREY, HEAT, VERMILION, grid, new_figure, save

if TYPE_CHECKING:
    from hilora.algorithms.clustering import Clustering


def draw_run(
    out: PathLike,
    summary: Mapping[str, Any],
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
    out = Path(out)
    title = "{strategy} on {data}, {partition}, seed {seed}".format_map(summary)
    title += " (interrupted)" if summary.get("interrupted") else ""
    seen, counts = seen.bool().cpu(), counts.cpu()
    groups = None if groups is None else groups.cpu()
    every = None if groups is None else groups.numpy()
    some = None if groups is None else groups[seen].numpy()
    plot_accuracy(records, out / "accuracy.png", title)
    clusters = summary.get("clusters")
    plot_clusters(
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
    plot_class_distribution(counts.numpy(), out / "classes.png", every, group_names, seen.numpy(), title)


def plot_accuracy(records: Sequence[Mapping[str, Any]], path: PathLike, title: str) -> None:
    """Test accuracy over the rounds: the mean over clients, its spread, the tail; validation beside it.

    Args:
        records: the lines of `metrics.jsonl`; a round without a measurement leaves a gap of no width.
        path: the PNG to write.
        title: stands above the figure.
    """
    figure = new_figure(9, 4.8, title)
    if not records:
        return message(figure, "no round has been trained", path)
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
    grid(axes, "y")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def plot_class_distribution(
    counts: Array,
    path: PathLike,
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
    names = group_labels(groups, group_names) if true_groups is not None else []
    clients = np.lexsort((np.arange(n), ~seen, groups)) if names else np.arange(n)
    owned = np.stack([counts[groups == g].sum(axis=0) for g in range(groups.max() + 1)])
    order = np.argsort(owned.argmax(axis=0), kind="stable")

    height = 1.9 + min(max(0.085 * n, 0.19 * len(names), 1.2), 9)
    figure = new_figure(min(max(4.5 + 0.07 * classes, 7), 12), height, title)
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
    save(figure, path)


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
