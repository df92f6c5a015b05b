"""The pictures of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray

from hilora.algorithms.clustering import Clustering
from hilora.reporting import plots
from hilora.reporting.cluster_plot import plot_clusters
from hilora.reporting.plots import draw_run
from tests.reporting.test_comparison import make_summary

pytestmark = pytest.mark.slow


def make_record(
    number: int, stage: str = "root", number_in_stage: int | None = None, mean: float = 0.5
) -> dict[str, Any]:
    accuracy = {"mean": mean, "tail": 0.3, "std": 0.1}
    figures = {"loss": 1.25, "val": accuracy, "test": accuracy, "images": 640, "seconds": 2.0}
    return {"round": number, "stage": stage, "round_in_stage": number_in_stage or number, **figures}


def is_drawn(path: Path) -> bool:
    """Whether the file is an image with something other than background in it."""
    image = imread(path)
    return image.ndim == 3 and min(image.shape[:2]) > 200 and bool(image[..., :3].std() > 0.01)


def make_distances(labels: NDArray[Any]) -> NDArray[Any]:
    generator = np.random.default_rng(0)
    distances = np.where(labels[:, None] == labels, 0.1, 0.9) + 0.02 * generator.random((len(labels), len(labels)))
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    return distances


NO_MEASUREMENT = {"round": 1, "stage": "root", "round_in_stage": 1, "test": {"mean": None, "tail": None, "std": None}}


@pytest.mark.parametrize(
    "records",
    [
        [],
        [make_record(1)],
        [NO_MEASUREMENT],
        [NO_MEASUREMENT, make_record(2), {**make_record(3), "val": None}],
        [make_record(i + 1, ("root", "cluster", "leaf")[i // 20]) for i in range(60)],
        [make_record(i + 1, f"a stage of its own {i}") for i in range(6)],
    ],
    ids=["none", "one", "unmeasured", "gaps", "sixty", "many stages"],
)
def test_accuracy_picture(tmp_path, records):
    plots.plot_accuracy(records, tmp_path / "accuracy.png", "title")
    assert is_drawn(tmp_path / "accuracy.png")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1), (20, 5), (40, 40)])
def test_cluster_picture(tmp_path, n, k, grouped):
    labels = np.arange(n) % k
    groups = np.roll(labels, 1) if grouped else None
    names = [f"a rather long name of group {g}" for g in range(k)] if grouped else []
    path = tmp_path / "clusters.png"
    plot_clusters(make_distances(labels), labels, np.linspace(0, 0.05, n)[1:], k, path, groups, names, "title")
    assert is_drawn(path)


def test_cluster_picture_without_distances(tmp_path):
    plot_clusters(None, np.array([0, 1, 1]), None, 2, tmp_path / "some.png", np.array([0, 1, 1]))
    plot_clusters(None, None, None, 0, tmp_path / "none.png", title="fedit")
    assert is_drawn(tmp_path / "some.png")
    assert is_drawn(tmp_path / "none.png")


def test_equal_distances_are_drawn(tmp_path):
    plot_clusters(np.zeros((4, 4)), np.zeros(4, dtype=int), np.zeros(3), 1, tmp_path / "clusters.png")
    assert is_drawn(tmp_path / "clusters.png")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("n", "classes"), [(1, 1), (3, 10), (200, 100)])
def test_class_picture(tmp_path, n, classes, grouped):
    counts = np.random.default_rng(0).poisson(1.0, (n, classes))
    groups = np.arange(n) % 7 if grouped else None
    path = tmp_path / "classes.png"
    plots.plot_class_distribution(counts, path, groups, seen=np.arange(n) % 5 > 0, title="title")
    assert is_drawn(path)
    assert max(imread(path).shape) < 2000


def test_class_picture_of_clients_without_images(tmp_path):
    plots.plot_class_distribution(np.zeros((3, 4), dtype=int), tmp_path / "classes.png")
    assert is_drawn(tmp_path / "classes.png")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("clusters", ["measured", "given", "none"])
def test_report_leaves_three_pictures(tmp_path, grouped, clusters):
    seen = torch.tensor([True, True, False, True])
    labels = np.array([0, 1, 1])
    distances = torch.from_numpy(make_distances(labels))
    clustering = Clustering(torch.from_numpy(labels), 2, distances, eigengaps=torch.tensor([0.1, 0.3]))
    draw_run(
        tmp_path,
        make_summary(clusters=None if clusters == "none" else {"k": 2, "labels": labels.tolist(), "ari": None}),
        [make_record(1), make_record(2, "cluster", 1)],
        counts=torch.randint(0, 9, (4, 10)),
        seen=seen,
        groups=torch.tensor([0, 1, 0, 1]) if grouped else None,
        group_names=("fish", "trees") if grouped else (),
        clustering=clustering if clusters == "measured" else None,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "classes.png", "clusters.png"]
    assert all(is_drawn(path) for path in tmp_path.iterdir())
