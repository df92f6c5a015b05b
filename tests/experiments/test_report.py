"""The report of a small ledger written by hand: tables, incomplete rows, plots, the page, a section of a document."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hilora.experiments import figures
from hilora.experiments.cells import Cell, collect
from hilora.experiments.experiment import Experiment
from hilora.experiments.ledger import Ledger
from hilora.experiments.plan import Job, final_jobs, tuning_jobs
from hilora.experiments.records import DIVERGED
from hilora.experiments.report import write_report
from hilora.experiments.tables import accuracy_table, cost_table, tier_table, tuning_table
from hilora.reporting.tables import Table
from tests.experiments.conftest import GRID, GRIDS, Write, line

pytestmark = pytest.mark.slow

TIERS = {
    "root": {"mean": 0.25, "tail": None, "std": 0.125},
    "leaf": {"mean": 0.5, "tail": None, "std": 0.0625},
}
DIAGNOSTICS = {
    "root": {"train_loss": 1.0, "overlap": {}, "label_distance": 0.5},
    "leaf": {"train_loss": 1.5, "overlap": {"root": 0.125}, "label_distance": 0.0},
}


@pytest.fixture
def experiment(write: Write) -> Experiment:
    """Two methods and a reference row that does not apply to `mixed`."""
    reference = 'reference = true\nstrategy = "fedit"\nsettings = ["groups"]\nwhy = "there are no groups"'
    return write(
        ('title = "Small"', 'title = "Small <& plain>"'),
        ("[methods.hilora]", f"[methods.given]\n{reference}\nrun = {{ rank = 1 }}\n{GRID}\n[methods.hilora]"),
        ('label = "HiLoRA"', f'label = "HiLoRA"\npaper = {{ groups = 93.4 }}\n{GRID}'),
        ("[methods.fedit]", f"[methods.fedit]\n{GRID}"),
        ("seeds = [0, 1]", 'seeds = [0, 1]\ncompare = "hilora"'),
        more=GRIDS,
    )


@pytest.fixture
def ledger(experiment: Experiment, tmp_path: Path) -> Ledger:
    """`groups` is done but for FedIT's second seed; of `mixed` one point of HiLoRA's tuning alone."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    setting = experiment.settings["groups"]
    mean = {"hilora": 0.5, "fedit": 0.25, "given": 0.75}
    for name, method in experiment.methods.items():
        first, second = tuning_jobs(experiment, setting, method)
        ledger.append(line(first, test=0.1, val=0.75))
        ledger.append(line(second) | {"results": {DIVERGED: "not finite"}})
        for job in final_jobs(experiment, ledger, setting, method)[: 1 if name == "fedit" else 2]:
            test = mean[name] + 0.02 * job.seed
            found: dict[str, Any] = {
                "per_client": {"ids": [0, 1, 2], "test": [test - 0.1, None, test + 0.1], "val": [0, 0, 0]},
                "communication": {"up": 2e6, "down": 500},
                "trained_parameters": 1000,
                "images": 2000,
                "unseen": {"zero_leaf": None, "leaf": 0.125},
            }
            if name == "hilora":
                found |= {"tiers": TIERS, "diagnostics": DIAGNOSTICS, "clusters": {"k": 5, "ari": 1.0 - job.seed / 4}}
            ledger.append(line(job, test=test, **found))
    other = experiment.settings["mixed"]
    ledger.append(line(tuning_jobs(experiment, other, experiment.methods["hilora"])[1], val=0.25))
    return ledger


@pytest.fixture
def cells(experiment: Experiment, ledger: Ledger) -> list[list[Cell]]:
    return collect(experiment, ledger)


def test_clients_of_each_budget_have_figures(cells: list[list[Cell]]) -> None:
    ours, theirs = cells[0][:2]
    for seed, one in ours.finals.items():
        one["results"]["budgets"] = [
            {
                "ranks": 8,
                "layers": 12,
                "accuracy": {"mean": 0.5 + 0.1 * seed},
                "flops": 3e9,
                "up": 8e4,
                "down": 9e4,
                "parameters": 1234,
            },
            {"ranks": 4, "layers": 6, "accuracy": {"mean": 0.25}, "flops": 1.5e9, "up": 4e4, "down": 450.0},
        ]
    table = accuracy_table([ours, theirs], ours)
    assert column(table, "by budget") == ["8 ranks/12 layers: 55.0, 4 ranks/6 layers: 25.0", "–"]
    costs = cost_table([ours, theirs])
    assert column(costs, "up a round, by budget")[0] == "8 ranks/12 layers: 80 kB, 4 ranks/6 layers: 40 kB"
    assert column(costs, "down a round, by budget")[0] == "8 ranks/12 layers: 90 kB, 4 ranks/6 layers: 450 B"
    assert column(costs, "trained parameters, by budget")[0] == "8 ranks/12 layers: 1,234, 4 ranks/6 layers: –"
    assert column(costs, "GFLOPs an image, by budget")[0] == "8 ranks/12 layers: 3, 4 ranks/6 layers: 1.5"


def column(table: Table, name: str) -> list[str]:
    return [row.cells[table.header.index(name)] for row in table.rows]


def test_the_table_of_accuracies(cells: list[list[Cell]]) -> None:
    compare = cells[0][0]
    table = accuracy_table(cells[0], compare)
    assert column(table, "method") == ["HiLoRA", "fedit†", "given"]
    assert [row.reference for row in table.rows] == [False, False, True]
    assert column(table, "runs") == ["2/2", "1/2", "2/2"]
    assert column(table, "accuracy") == ["51.0 ± 1.4", "25.0", "76.0 ± 1.4"]
    assert column(table, "minus HiLoRA [95 %]") == ["–", "−25.0 [−25.0, −25.0]", "+25.0 [+25.0, +25.0]"]
    assert column(table, "by seed") == ["–", "0: −25.0", "0: +25.0, 1: +25.0"]
    assert column(table, "K") == ["5", "–", "–"]  # once, where all seeds agree
    assert column(table, "ARI") == ["0: 1.00, 1: 0.75", "–", "–"]
    assert column(table, "published") == ["93.4", "–", "–"]
    assert column(table, "unseen, own epochs") == ["12.5 ± 0.0", "12.5", "12.5 ± 0.0"]
    assert "unseen, zero leaf" not in table.header  # nothing fills it


def test_what_is_missing_or_does_not_apply_keeps_its_row(cells: list[list[Cell]]) -> None:
    table = accuracy_table(cells[1], cells[1][0])
    assert column(table, "method") == ["HiLoRA†", "fedit†", "given"]
    assert column(table, "runs") == ["0/1 (tuning 1/2)", "0/1 (tuning 0/2)", "does not apply"]


def test_without_clients_the_difference_is_that_of_the_means(experiment: Experiment, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "other.jsonl")
    setting = experiment.settings["mixed"]
    for name, test in (("hilora", 0.5), ("fedit", 0.375)):
        for job in tuning_jobs(experiment, setting, experiment.methods[name]):
            ledger.append(line(job))
        for job in final_jobs(experiment, ledger, setting, experiment.methods[name]):
            ledger.append(line(job, test=test))
    mixed = collect(experiment, ledger)[1]
    assert column(accuracy_table(mixed, mixed[0]), "minus HiLoRA [95 %]")[1] == "−12.5"


def runs(experiment: Experiment, ledger: Ledger, name: str) -> list[Job]:
    """The final runs of a method in `groups`, tuned before if need be."""
    setting, method = experiment.settings["groups"], experiment.methods[name]
    for job in tuning_jobs(experiment, setting, method):
        ledger.append(line(job))
    return final_jobs(experiment, ledger, setting, method)


def test_a_difference_of_fewer_seeds_is_marked_where_the_row_compared_with_lacks_them(
    experiment: Experiment, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "other.jsonl")
    ours, theirs = (runs(experiment, ledger, name) for name in ("hilora", "fedit"))
    ledger.append(line(ours[1], test=0.5, clusters={"k": 5, "ari": 1.0}))
    for job in theirs:
        ledger.append(line(job, test=0.25))
    groups = collect(experiment, ledger)[0]
    table = accuracy_table(groups, groups[0])
    assert column(table, "method") == ["HiLoRA†", "fedit", "given†"]
    assert column(table, "minus HiLoRA [95 %]") == ["–", "−25.0†", "–"]
    assert column(table, "by seed") == ["–", "1: −25.0", "–"]
    assert column(table, "K") == ["1: 5", "–", "–"]  # not all seeds have one
    markdown, _ = write_report(experiment, ledger, tmp_path / "out")
    assert "at a difference, those of HiLoRA are not" in markdown.read_text()


def test_a_row_that_diverged_has_no_mean(experiment: Experiment, ledger: Ledger, tmp_path: Path) -> None:
    last = runs(experiment, ledger, "fedit")[1]
    ledger.append(line(last) | {"results": {DIVERGED: "not finite"}})
    for job in tuning_jobs(experiment, experiment.settings["groups"], experiment.methods["given"]):
        ledger.append(line(job) | {"results": {DIVERGED: "not finite"}})
    groups = collect(experiment, ledger)[0]
    table = accuracy_table(groups, groups[0])
    assert column(table, "method") == ["HiLoRA", "fedit", "given"]
    assert column(table, "runs") == ["2/2", "2/2, diverged: seed 1", "no final runs: every grid point diverged"]
    assert column(table, "accuracy") == ["51.0 ± 1.4", "–", "–"]
    assert "by seed" not in table.header
    assert groups[1].accuracy() is None
    assert column(cost_table(groups), "method") == ["HiLoRA"]
    markdown, _ = write_report(experiment, ledger, tmp_path / "out")
    assert "4 of 6 final runs are done" in markdown.read_text()
    assert "A row of which a seed diverged has no figures" in markdown.read_text()


def test_a_point_is_at_the_end_of_a_grid_or_inside(write: Write, tmp_path: Path) -> None:
    grid = "grid = [{}, { lr = 1e-3 }, { lr = 1e-2 }]"
    changes = (('label = "HiLoRA"', grid), ("[methods.fedit]", f"[methods.fedit]\n{grid}"))
    experiment, ledger = write(*changes, more=GRIDS), Ledger(tmp_path / "other.jsonl")
    for name, values in (("hilora", (0.1, 0.3, 0.2)), ("fedit", (0.1, 0.2, 0.3))):
        jobs = tuning_jobs(experiment, experiment.settings["groups"], experiment.methods[name])
        for job, value in zip(jobs, values, strict=True):
            ledger.append(line(job, val=value))
    table = tuning_table(collect(experiment, ledger)[0])
    assert column(table, "") == ["", "chosen", "", "", "", "chosen, at the end of the grid"]


def test_costs_tiers_and_tuning(cells: list[list[Cell]]) -> None:
    cost = cost_table(cells[0])
    assert column(cost, "up a round") == ["2 MB"] * 3
    assert column(cost, "down a round") == ["500 B"] * 3
    assert column(cost, "trained parameters") == ["1,000"] * 3
    tiers = tier_table(cells[0])
    assert column(tiers, "tier") == ["root", "leaf"]
    assert column(tiers, "accuracy ± over clients") == ["25.0 ± 12.5", "50.0 ± 6.2"]
    assert column(tiers, "training loss") == ["1.000", "1.500 ▲ rose"]
    assert column(tiers, "overlap with") == ["–", "root 0.125"]
    tuning = tuning_table(cells[0])
    assert column(tuning, "validation accuracy") == ["75.00", "diverged"] * 3
    assert column(tuning, "") == ["chosen, at the end of the grid", ""] * 3
    assert column(tuning_table(cells[1]), "validation accuracy") == ["missing", "25.00", "missing", "missing"]


class Page(HTMLParser):
    """What a page opens, closes and refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "style")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(experiment: Experiment, ledger: Ledger, tmp_path: Path) -> None:
    markdown, page = write_report(experiment, ledger, tmp_path / "out")
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.tags.isdisjoint({"script", "link", "iframe"})
    assert len(parsed.sources) == 3  # the plots of `groups`; `mixed` has nothing to draw
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "Small &lt;&amp; plain&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    said = markdown.read_text()
    for phrase in (
        "5 of 8 final runs are done; the rest is missing",
        "† incomplete",
        "given does not apply: there are no groups.",
        "these figures say nothing about CIFAR-100",
        "under the conditions of that paper",
        "python -m hilora.experiments run small.toml --data-dir DIR",
        "2026-01-02; hilora 0.1.0 abc; torch 2.11; a device",
        "lr = 0.001",
        "once, with seed 100,",
        "searched on a smaller problem than that of the final runs: clients = 3.",
        "No grid was chosen by unseen clients",
        "Intervals take clients as independent",
    ):
        assert phrase in said
    assert str(tmp_path) not in said
    for picture in (tmp_path / "out").glob("*.png"):
        assert f"({picture.name})" in said
        with Image.open(picture) as image:
            assert image.width > 400


def test_lines_that_the_file_no_longer_asks_for_are_counted_and_not_used(
    experiment: Experiment, ledger: Ledger, tmp_path: Path
) -> None:
    ledger.append(ledger.lines[0] | {"decides": {**ledger.lines[0]["decides"], "data": "other"}})
    markdown, _ = write_report(experiment, ledger, tmp_path / "out")
    assert "also keeps 1 run that the file no longer asks for" in markdown.read_text()
    assert "75.00" in markdown.read_text()


def test_an_empty_ledger_gives_a_report_of_what_is_missing(write: Write, tmp_path: Path) -> None:
    experiment = write()
    markdown, page = write_report(experiment, Ledger(tmp_path / "none.jsonl"), tmp_path / "out")
    assert "0 of 6 final runs are done" in markdown.read_text()
    assert "HiLoRA† | 0/2" in markdown.read_text()
    assert Page(page.read_text()).sources == []


def test_a_section_of_a_document_is_exchanged(
    experiment: Experiment, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    draw = figures.plot_accuracies

    def count(cells: Sequence[Cell], path: Path) -> bool:
        drawn.append(path)
        return draw(cells, path)

    monkeypatch.setattr(figures, "plot_accuracies", count)
    document = tmp_path / "docs" / "results.md"
    document.parent.mkdir()
    document.write_text("# Results\n\n<!-- begin small -->\nold\n<!-- end small -->\n\nafter\n")
    write_report(experiment, ledger, tmp_path / "out", document)
    assert len(drawn) == len(experiment.settings)  # once each
    text = document.read_text()
    assert text.startswith("# Results\n\n<!-- begin small -->\n\n## Small")
    assert text.endswith("<!-- end small -->\n\nafter\n")
    assert "old" not in text
    assert "\n### groups\n" in text
    assert "](results/small-groups-accuracy.png)" in text
    picture = tmp_path / "docs" / "results" / "small-groups-accuracy.png"
    assert picture.read_bytes() == (tmp_path / "out" / picture.name).read_bytes()
    write_report(experiment, ledger, tmp_path / "out", document)
    assert document.read_text() == text


@pytest.mark.parametrize("text", ["", "<!-- begin small -->", "<!-- end small --> <!-- begin small -->"])
def test_a_document_without_markers_is_left_alone(
    experiment: Experiment, ledger: Ledger, tmp_path: Path, text: str
) -> None:
    document = tmp_path / "results.md"
    document.write_text(text)
    with pytest.raises(ValueError, match="<!-- begin small --> and after it a line <!-- end small -->"):
        write_report(experiment, ledger, tmp_path / "out", document)
    assert document.read_text() == text
    assert not (tmp_path / "out").exists()
