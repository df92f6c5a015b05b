"""Progress, tables and pictures of a run."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray

from hilora.algorithms.clustering import Clustering
from hilora.reporting import plots
from hilora.reporting.run import Progress, markdown_table, table, write_report


def make_record(
    number: int, stage: str = "root", number_in_stage: int | None = None, mean: float = 0.5
) -> dict[str, Any]:
    accuracy = {"mean": mean, "tail": 0.3, "std": 0.1}
    figures = {"loss": 1.25, "val": accuracy, "test": accuracy, "images": 640, "seconds": 2.0}
    return {"round": number, "stage": stage, "round_in_stage": number_in_stage or number, **figures}


def make_summary(**changes: Any) -> dict[str, Any]:
    accuracy = {"mean": 0.6512, "tail": 0.412, "std": 0.0987}
    return {
        "strategy": "hilora",
        "partition": "sc-dir",
        "seed": 0,
        "data": "cifar100",
        "backbone": "vit_base_patch16_224",
        "tiers": {"root": accuracy, "cluster": {**accuracy, "mean": 0.8}, "leaf": {**accuracy, "mean": 0.934}},
        "final": {"mean": 0.934, "tail": 0.791, "std": 0.06},
        "unseen": {"zero_leaf": 0.811, "leaf": 0.859},
        "clusters": {"k": 5, "labels": [0, 1], "ari": 1.0},
        "seconds": 123.4,
        "images_per_second": 4321.0,
        "interrupted": False,
    } | changes


FEDIT = make_summary(
    strategy="fedit",
    tiers={"root": {"mean": 0.7, "tail": 0.5, "std": 0.2}},
    final={"mean": 0.7, "tail": None, "std": float("nan")},
    unseen={"zero_leaf": 0.0, "leaf": None},
    clusters=None,
)


def is_drawn(path: Path) -> bool:
    """Whether the file is an image with something other than background in it."""
    image = imread(path)
    return image.ndim == 3 and min(image.shape[:2]) > 200 and bool(image[..., :3].std() > 0.01)


# -- tables ---------------------------------------------------------------------------------------------------------


def test_table_shows_every_figure_in_its_column():
    lines = table([make_summary(), FEDIT]).splitlines()
    assert lines[0] == "Data cifar100, backbone vit_base_patch16_224, partition sc-dir, seed 0"
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("hilora", "fedit"))}
    assert rows["hilora"] == "hilora 65.1 80.0 93.4 93.4 79.1 6.0 81.1 85.9 5 1.00 123 4321".split()  # noqa: SIM905
    assert rows["fedit"] == "fedit 70.0 – – 70.0 – – 0.0 – – – 123 4321".split()  # noqa: SIM905
    for word in ("root", "+ cluster", "+ leaf", "tail", "std", "zero leaf", "K", "ARI", "img/s"):
        assert word in "\n".join(lines)


def test_table_is_aligned_and_narrow():
    many = [make_summary(), FEDIT, make_summary(strategy="hilora-true-groups", seconds=1234567.0)]
    lines = table(many).splitlines()
    start = next(i for i, line in enumerate(lines) if set(line) == {"-"})
    rows = lines[start + 1 : start + 4]
    assert len({len(row) for row in rows}) == 1
    ends = [[match.end() for match in re.finditer(r"\S+", row)][1:] for row in rows]
    assert ends[0] == ends[1] == ends[2]
    assert max(map(len, lines)) <= 110


def test_table_warns_of_glyphs_only():
    assert "nothing about CIFAR-100" in table([make_summary(data="glyphs")])
    assert "Warning" not in table([make_summary()])
    assert "nothing about CIFAR-100" in markdown_table([make_summary(data="glyphs")])


def test_runs_of_other_settings_form_their_own_tables():
    text = table([make_summary(), make_summary(seed=1), make_summary(strategy="fedit")])
    first, second = text.split("\n\n")
    assert "seed 0" in first
    assert "fedit" in first
    assert "seed 1" in second
    assert "fedit" not in second


def test_interrupted_runs_are_marked():
    assert "hilora* " in table([make_summary(interrupted=True)])
    assert "* interrupted" in table([make_summary(interrupted=True)])
    assert "interrupted" not in table([make_summary()])


def test_incomplete_and_absent_summaries():
    assert table([]) == markdown_table([]) == ""
    cells = table([{"strategy": "x"}]).splitlines()[-2].split()
    assert cells == ["x"] + ["–"] * 12


def test_markdown_has_partition_and_seed_and_equal_cells():
    text = markdown_table([make_summary(), make_summary(partition="patho", seed=3, interrupted=True)])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| strategy | partition | seed | root | + cluster |")
    assert rows[2].startswith("| hilora | sc-dir | 0 | 65.1 | 80.0 | 93.4 |")
    assert rows[3].startswith(r"| hilora\* | patho | 3 |")
    assert {row.count("|") for row in rows} == {16}
    assert "seed 0" not in text.splitlines()[0]


# -- progress -------------------------------------------------------------------------------------------------------


def test_progress_away_from_a_terminal_prints_a_line_a_stage(capsys):
    with Progress(4, "hilora") as progress:
        for record in (make_record(1), make_record(2), make_record(3, "cluster", 1, 0.75)):
            progress.round(record)
        progress.note("5 clusters")
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("hilora: root done, 2 rounds")
    assert lines[1] == "5 clusters"
    assert lines[2].startswith("hilora: cluster done, 1 round ")
    assert lines[2].endswith("acc 75.0 %, tail 30.0 %, loss 1.250")


def test_progress_bar_shows_stage_and_accuracy_and_resumes(capsys):
    with Progress(10, "hilora", enabled=True) as progress:
        progress.round(make_record(6, "leaf", 2))
        progress.note("a note")
    out, err = capsys.readouterr()
    assert "a note\n" in out
    assert "6/10" in err
    assert "leaf, acc 50.0 %, tail 30.0 %" in err


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_survives_an_interruption(capsys, enabled):
    def run() -> None:
        with Progress(3, "hilora", enabled=enabled) as progress:
            progress.round(make_record(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    out, err = capsys.readouterr()
    assert "root stopped, 1 round " in out
    assert err.endswith("\n") == enabled


def test_progress_without_rounds_or_measurements(capsys):
    with Progress(0, "local"):
        pass
    with Progress(1, "local") as progress:
        progress.round({"round": 1, "stage": "leaf", "round_in_stage": 1, "test": {"mean": None}, "loss": float("nan")})
    assert capsys.readouterr().out.startswith("local: leaf done, 1 round")


def test_notes_fit_a_terminal_that_knows_ascii_only(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    with Progress(1, "x") as progress:
        progress.note("a – b")
    assert stdout.buffer.getvalue() == b"a ? b\n"


# -- pictures -------------------------------------------------------------------------------------------------------


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
    plots.plot_clusters(make_distances(labels), labels, np.linspace(0, 0.05, n)[1:], k, path, groups, names, "title")
    assert is_drawn(path)


def test_cluster_picture_without_distances(tmp_path):
    plots.plot_clusters(None, np.array([0, 1, 1]), None, 2, tmp_path / "some.png", np.array([0, 1, 1]))
    plots.plot_clusters(None, None, None, 0, tmp_path / "none.png", title="fedit")
    assert is_drawn(tmp_path / "some.png")
    assert is_drawn(tmp_path / "none.png")


def test_equal_distances_are_drawn(tmp_path):
    plots.plot_clusters(np.zeros((4, 4)), np.zeros(4, dtype=int), np.zeros(3), 1, tmp_path / "clusters.png")
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
    write_report(
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
