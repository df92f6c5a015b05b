"""What the documentation says is so: links lead somewhere, figures are the ledgers', variables are those read."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from markdown.extensions.toc import slugify

from benchmarks import report
from benchmarks.figures import by_device
from benchmarks.ledger import read
from hilora.experiments import figures
from hilora.experiments.cells import Cell, collect
from hilora.experiments.ledger import Ledger
from hilora.experiments.report import write_report
from hilora.experiments.spec import read_experiment
from tests.docs.pages import FENCE, PAGES, ROOT, prose

pytestmark = pytest.mark.slow

LINK = re.compile(r"\]\((?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
LEDGER = ".ledger.jsonl"
EXPERIMENTS = sorted(path.name.removesuffix(LEDGER) for path in (ROOT / "benchmarks/experiments").glob(f"*{LEDGER}"))
TABLES = {"sc-dir": "sc-dir", "PACS": "pacs", "patho": "patho", "gl-dir": "gl-dir"}
"""What a column is called, and the setting that it is of."""
WITHOUT = {
    "orthogonality": "without orthogonality (γ = 0)",
    "the cluster tier": "root and leaf (8/0/4)",
    "the leaf": "root and cluster (4/8/0)",
    "products": "A and B averaged apart",
    "its groups": "random clusters, as many",
    "our changes": "clustering and routing to the letter",
}


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {slugify(re.sub(r"[`*]|\]\([^)]*\)", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for found in LINK.finditer(prose(page)):
        path, anchor = found["path"], found["anchor"]
        assert not path.startswith("/")
        if re.match(r"\w+:", path):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links {path}"
        if anchor and not (page.startswith("docs/") and "reference" in path):  # the build knows those of docstrings
            assert anchor in anchors(target), f"{page} links {path}#{anchor}"


@cache
def cells(name: str) -> dict[tuple[str, str], Cell]:
    """The cells of an experiment by setting and label; under "" the one that the others are compared with."""
    file = ROOT / "benchmarks" / "experiments" / f"{name}.toml"
    experiment = read_experiment(file)
    found = collect(experiment, Ledger(file.with_suffix(".ledger.jsonl")))
    named = {(cell.setting.name, cell.method.label): cell for row in found for cell in row}
    compared = {
        (cell.setting.name, ""): cell for row in found for cell in row if cell.method.name == experiment.compare
    }
    return named | compared


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_full_tables_are_those_of_the_ledger(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*given: Any) -> bool:
        (path,) = (one for one in given if isinstance(one, Path))
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return True

    for plot in ("plot_accuracies", "plot_differences", "plot_traffic"):
        monkeypatch.setattr(figures, plot, draw)
    monkeypatch.chdir(ROOT)
    file = Path("benchmarks/experiments") / f"{name}.toml"
    committed = file.with_suffix(".md").read_text(encoding="utf-8")
    (tmp_path / f"{name}.md").write_text(committed, encoding="utf-8")
    ledger = Ledger(file.with_suffix(".ledger.jsonl"))
    write_report(read_experiment(file), ledger, tmp_path / "out", tmp_path / f"{name}.md")
    assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == committed
    drawn = {path.name for path in (tmp_path / name).iterdir()}
    assert drawn == {path.name for path in file.with_suffix("").iterdir()}


def accuracy(cell: Cell) -> str:
    means = cell.over_seeds("final", "mean")
    assert means is not None
    assert means.std is not None
    return f"{100 * means.mean:.1f} ± {100 * means.std:.1f}"


def difference(cell: Cell, to: Cell) -> str:
    found = cell.less(to)[1]
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    mean, low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in (found.mean, found.low, found.high))
    return rf"{mean} \[{low}, {high}\]"


def unseen(cell: Cell) -> str:
    found = [cell.over_seeds("unseen", key) for key in ("zero_leaf", "leaf")]
    return " → ".join(f"{100 * value.mean:.1f}" for value in found if value is not None)


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the header first."""
    text = (ROOT / page).read_text(encoding="utf-8")
    parts = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    rows = [[re.split(r" *\| *", line.strip("| ")) for line in part.splitlines()] for part in parts]
    return [[row for row in table if not re.fullmatch(r"[:\- ]+", "".join(row))] for table in rows]


def settings(header: list[str]) -> list[str]:
    return [TABLES[name.removeprefix("CIFAR-100 ")] for name in header[1:]]


@pytest.mark.parametrize(("page", "methods"), [("README.md", 5), ("docs/results.md", 19)])
def test_accuracies_are_those_of_the_ledger(page: str, methods: int) -> None:
    table = next(table for table in tables(page) if "±" in table[1][1])
    assert len(table) == methods + 1
    for method, *values in table[1:]:
        expected = [accuracy(cells("methods")[setting, method]) for setting in settings(table[0])]
        assert [value.strip("*") for value in values] == expected, method


def test_bold_is_the_highest() -> None:
    table = next(table for table in tables("docs/results.md") if "±" in table[1][1])
    for column in zip(*(row[1:] for row in table[1:]), strict=True):
        bold = [value for value in column if value.startswith("**")]
        assert bold == [max(column, key=lambda value: float(value.strip("*").split()[0]))]


def test_differences_are_those_of_the_ledger() -> None:
    table = next(table for table in tables("docs/results.md") if table[0][1].startswith("FedDPA-F minus HiLoRA"))
    where = [("methods", setting) for setting in TABLES.values()] + [
        ("more_images", "sc-dir"),
        ("more_clients", "pacs"),
    ]
    expected = [difference(cells(name)[at, "FedDPA-F"], cells(name)[at, ""]) for name, at in where]
    assert [row[1] for row in table[1:]] == expected


def test_unequal_clients_are_those_of_the_ledger() -> None:
    table = next(table for table in tables("docs/results.md") if table[0][0] == "unequal clients")
    assert len(table) == 12
    for method, *values in table[1:]:
        assert values == [accuracy(cells("unequal")[at, method.strip("*")]) for at in settings(table[0])]
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for at in settings(table[0]):
        more = difference(cells("unequal")[at, "HiLoRA, all at 9 ranks"], cells("unequal")[at, ""])
        assert more.removeprefix("+") in text


def test_what_parts_are_worth_is_as_the_ledger_has_it() -> None:
    table = next(table for table in tables("docs/results.md") if table[0][0] == "without")
    assert len(table) == len(WITHOUT) + 1
    for row, (start, label) in zip(table[1:], WITHOUT.items(), strict=True):
        assert row[0].startswith(start)
        for value, at in zip(row[1:], settings(table[0]), strict=True):
            cell = cells("ablations")[at, label]
            assert value == (difference(cell, cells("ablations")[at, ""]) if cell.applies else "–")


def test_unseen_clients_are_those_of_the_ledger() -> None:
    table = next(table for table in tables("docs/results.md") if "→" in table[1][1])
    for method, *values in table[1:]:
        assert values == [unseen(cells("methods")[at, method]) for at in settings(table[0])]


def test_the_page_of_results_can_be_read_in_one_go() -> None:
    assert len((ROOT / "docs/results.md").read_text().splitlines()) < 200
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_every_variable_stands_in_the_table_once_and_no_other_does() -> None:
    reads = re.compile(r"(?:environ(?:\.get\(|\[)|getenv\(|\$\{?)\s*[\"']?(HILORA_[A-Z_]+)")
    files = [
        path
        for folder in ("hilora", "kernels", "benchmarks", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {
        name for path in (*files, ROOT / "Makefile", ROOT / "docs/hooks.py") for name in reads.findall(path.read_text())
    }
    (table,) = tables("docs/reference/environment.md")
    listed = [row[0].strip("`") for row in table[1:]]
    assert sorted(found) == sorted(listed)


def test_the_benchmarks_are_those_of_the_ledger() -> None:
    page, devices = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"), by_device(read())
    written = ((report.HEADLINE, report.headline(devices)), (report.EVERYTHING, report.everything(devices)))
    for (begin, end), text in written:
        assert f"{begin}\n{text}\n{end}" in page
    times_of_peft = re.search(r"^\| PEFT \| [^|]+ \| ([\d.]+)[^|]* \|$", page, re.MULTILINE)
    assert times_of_peft is not None
    share = f"about {1 / float(times_of_peft[1]):.1f} times"
    assert share in page
    assert share in (ROOT / "README.md").read_text(encoding="utf-8")
