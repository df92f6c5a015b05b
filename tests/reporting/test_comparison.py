"""Runs side by side."""

import json
import re
from typing import Any

from hilora.reporting.comparison import comparison_markdown, comparison_text, write_comparison


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


def test_table_shows_every_figure_in_its_column():
    lines = comparison_text([make_summary(), FEDIT]).splitlines()
    assert lines[0] == "Data cifar100, backbone vit_base_patch16_224, partition sc-dir, seed 0"
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("hilora", "fedit"))}
    assert rows["hilora"] == "hilora 65.1 80.0 93.4 93.4 79.1 6.0 81.1 85.9 5 1.00 123 4321".split()  # noqa: SIM905
    assert rows["fedit"] == "fedit 70.0 – – 70.0 – – 0.0 – – – 123 4321".split()  # noqa: SIM905
    for word in ("root", "+ cluster", "+ leaf", "tail", "std", "zero leaf", "K", "ARI", "img/s"):
        assert word in "\n".join(lines)


GROUPS = [
    {
        "ranks": 8,
        "layers": None,
        "clients": [0, 3, 4],
        "accuracy": {"mean": 0.9, "tail": 0.7, "std": 0.1},
        "unseen": {"zero_leaf": 0.5, "leaf": None},
        "parameters": 12345,
        "up": 81234.0,
        "down": 1.5e6,
        "flops": 3.21e9,
    },
    {
        "ranks": 2,
        "layers": 6,
        "clients": [1],
        "accuracy": {"mean": None, "tail": None, "std": None},
        "up": 99.0,
        "down": 0.0,
        "flops": None,
    },
]


def test_clients_of_each_budget_have_a_row_where_a_run_has_budgets():
    runs = [make_summary(), make_summary(strategy="flexlora", budgets=GROUPS)]
    lines = comparison_text(runs).splitlines()
    rows = [line.split() for line in lines if line.startswith("flexlora")][1:]
    assert rows == [
        "flexlora 8 ranks 3 90.0 50.0 – 81.2 kB 1.5 MB 3.21 12,345".split(),  # noqa: SIM905
        "flexlora 2 ranks/6 layers 1 – – – 99 B 0 B – –".split(),  # noqa: SIM905
    ]
    assert "| flexlora | sc-dir | 0 | 8 ranks | 3 | 90.0 |" in comparison_markdown(runs)
    assert "budget" not in comparison_text(runs[:1])


def test_table_is_aligned_and_narrow():
    many = [make_summary(), FEDIT, make_summary(strategy="hilora-true-groups", seconds=1234567.0)]
    lines = comparison_text(many).splitlines()
    start = next(i for i, line in enumerate(lines) if set(line) == {"-"})
    rows = lines[start + 1 : start + 4]
    assert len({len(row) for row in rows}) == 1
    ends = [[match.end() for match in re.finditer(r"\S+", row)][1:] for row in rows]
    assert ends[0] == ends[1] == ends[2]
    assert max(map(len, lines)) <= 110


def test_table_warns_of_glyphs_only():
    assert "nothing about CIFAR-100" in comparison_text([make_summary(data="glyphs")])
    assert "Warning" not in comparison_text([make_summary()])
    assert "nothing about CIFAR-100" in comparison_markdown([make_summary(data="glyphs")])


def test_runs_of_other_settings_form_their_own_tables():
    text = comparison_text([make_summary(), make_summary(seed=1), make_summary(strategy="fedit")])
    first, second = text.split("\n\n")
    assert "seed 0" in first
    assert "fedit" in first
    assert "seed 1" in second
    assert "fedit" not in second


def test_interrupted_runs_are_marked():
    assert "hilora* " in comparison_text([make_summary(interrupted=True)])
    assert "* interrupted" in comparison_text([make_summary(interrupted=True)])
    assert "interrupted" not in comparison_text([make_summary()])


def test_incomplete_and_absent_summaries():
    assert comparison_text([]) == comparison_markdown([]) == ""
    cells = comparison_text([{"strategy": "x"}]).splitlines()[-2].split()
    assert cells == ["x"] + ["–"] * 12


def test_markdown_has_partition_and_seed_and_equal_cells():
    text = comparison_markdown([make_summary(), make_summary(partition="patho", seed=3, interrupted=True)])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| strategy | partition | seed | root | + cluster |")
    assert rows[2].startswith("| hilora | sc-dir | 0 | 65.1 | 80.0 | 93.4 |")
    assert rows[3].startswith(r"| hilora\* | patho | 3 |")
    assert {row.count("|") for row in rows} == {16}
    assert "seed 0" not in text.splitlines()[0]


def test_a_table_of_all_beside_their_folders(tmp_path):
    write_comparison(tmp_path, [make_summary(), FEDIT])
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith(comparison_markdown([make_summary(), FEDIT]))
    assert text.endswith("[fedit: its report](fedit/report.html)\n")
    page = (tmp_path / "comparison.html").read_text()
    assert '<a href="hilora/report.html">' in page
    assert page.count("<td>93.4</td>") == 2  # after the leaf, which is the last tier
    first, second = json.loads((tmp_path / "comparison.json").read_text())
    assert first == make_summary()
    assert second["final"]["std"] is None
