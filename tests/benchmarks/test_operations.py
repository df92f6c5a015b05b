"""An operation is one file: with it, it is timed and reported, and nothing else changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks.operations
from benchmarks import report, test_bench
from benchmarks.contest import WrongResult
from benchmarks.ledger import Ledger, read
from benchmarks.operations import operations
from tests.benchmarks.test_contest import Benchmark
from tests.benchmarks.test_report import TEXT

FILE = """
from typing import NamedTuple

import torch

from benchmarks.contest import Contestant, Lineup
from benchmarks.cost import Cost
from benchmarks.operations import Operation

class Vector(NamedTuple):
    length: int

def lineup(shape, phase, scale):
    x = torch.arange(1.0, shape.length)
    cost = Cost(((shape.length, 8 * shape.length),))
    steps = {"hilora": lambda: 2 * x, "a sum": lambda: x + x + (shape.length > 5)}
    rivals = {name: Contestant(step, lambda step=step: [step()], cost, 1e-6) for name, step in steps.items()}
    return Lineup(rivals, {"": [2 * x.double()]})

OPERATION = Operation("Twice as much", Vector, lambda scale: [Vector(5), Vector(6)], lineup)
"""


@pytest.fixture(autouse=True)
def _one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "twice.py").write_text(FILE)
    monkeypatch.setattr(benchmarks.operations, "__path__", [*benchmarks.operations.__path__, str(tmp_path / "folder")])
    operations.cache_clear()
    yield
    operations.cache_clear()
    sys.modules.pop("benchmarks.operations.twice")


def test_a_new_file_is_timed_and_stands_in_the_report(tmp_path: Path) -> None:
    assert list(operations())[-1] == "twice"  # behind those that say where they stand
    ledger = Ledger(tmp_path / "figures.jsonl", "toy")
    first, second = operations()["twice"].shapes("toy")
    test_bench.test_operation(Benchmark(), ledger, "twice", "step", first)
    with pytest.raises(WrongResult, match="a sum"):
        test_bench.test_operation(Benchmark(), ledger, "twice", "step", second)
    assert [(f["op"], f["length"], f["rival"]) for f in read(ledger.path)] == [
        ("twice", 5, "hilora"),
        ("twice", 5, "a sum"),
    ]
    (tmp_path / "benchmarks.md").write_text(TEXT)
    report.main(["--figures", str(ledger.path), "--docs", str(tmp_path)])
    text = (tmp_path / "benchmarks.md").read_text()
    assert "### Twice as much\n\n| length | ours, ms | floor / ours | a sum |" in text
