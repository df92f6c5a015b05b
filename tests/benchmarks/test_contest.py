"""No figure without a right result, and each with its conditions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Contestant, Lineup, WrongResult, contest
from benchmarks.cost import Cost
from benchmarks.ledger import Ledger, read

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
x = torch.arange(1.0, 101)


class Benchmark:
    """pytest-benchmark's fixture, as much of it as a contest needs."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, step: Any, args: Any, rounds: int) -> None:
        step(*args)


def double(values: Tensor) -> Tensor:
    return 2 * values


def run(path: Path, **rivals: Contestant) -> dict[str, Any]:
    benchmark = Benchmark()
    contest(benchmark, Ledger(path, "toy"), {"op": "double"}, Lineup(rivals, {"": [2 * x.double()]}, [(x,)]))
    return benchmark.extra_info


def contestant(step: Any, share: float = 1.0) -> Contestant:
    return Contestant(step, lambda values: [step(values)], Cost(((100, 800),)), 1e-5, share)


def test_a_figure_for_each_rival(tmp_path: Path) -> None:
    info = run(tmp_path / "new" / "figures.jsonl", ours=contestant(double), other=contestant(lambda v: v + v))
    ours, other = read(tmp_path / "new" / "figures.jsonl")
    assert [ours["rival"], other["rival"]] == ["ours", "other"] == list(info)
    assert ours["run"] == other["run"]
    assert ours["op"] == "double"
    assert 0 < ours["ms_quartiles"][0] <= ours["ms"] <= ours["ms_quartiles"][1]
    assert ours["peak_mb"] == pytest.approx(400 / 1e6, abs=5e-4)
    assert ours["error"] < 1e-7
    assert {"device", "threads", "torch", "triton", "peft", "hilora", "date"} <= set(ours)
    assert "1.00 x ours" in info["ours"]


def test_a_share_counts_as_the_whole(tmp_path: Path) -> None:
    figures = tmp_path / "figures.jsonl"
    slow = contestant(lambda v: torch.linalg.inv(torch.eye(200) * 2)[0, 0] * 4 * v)
    run(figures, whole=slow, tenth=slow._replace(share=0.001))
    whole, tenth = read(figures)
    assert tenth["ms"] > 100 * whole["ms"]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda v: 2.001 * v, id="all a little"),
        pytest.param(lambda v: torch.cat([2 * v[:-1], 2.1 * v[:1]]), id="one element"),
        pytest.param(lambda v: torch.cat([2 * v[:-1], v[:1] * torch.nan]), id="not a number"),
        pytest.param(lambda v: 2 * v[:-1], id="shape"),
    ],
)
@pytest.mark.parametrize("whose", ["ours", "other"])
def test_a_wrong_result_has_no_figure(tmp_path: Path, wrong: Any, whose: str) -> None:
    rivals = {"ours": contestant(double), "other": contestant(double), whose: contestant(wrong)}
    with pytest.raises(WrongResult, match=whose):
        run(tmp_path / "figures.jsonl", **rivals)
    assert not (tmp_path / "figures.jsonl").exists()


def test_a_rival_that_cannot_run_does_not_take_the_others_along(tmp_path: Path) -> None:
    def fails(values: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(ExceptionGroup, match="could not run") as caught:
        run(tmp_path / "f", ours=contestant(double), broken=contestant(fails), other=contestant(double))
    assert caught.value.exceptions[0].__notes__ == ["while running broken"]
    assert [figure["rival"] for figure in read(tmp_path / "f")] == ["ours", "other"]
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "g", ours=contestant(fails), other=contestant(double))
    assert not (tmp_path / "g").exists()


def test_one_wrong_row_among_many_has_no_figure(tmp_path: Path) -> None:
    """Its share of the mean square error is below the tolerance of 16 bit."""
    many = 1 + torch.rand(50_432, 8, dtype=torch.float64)
    short = many.clone()
    short[-1] = 0
    assert (short - many).norm() < 1e-2 * many.norm()
    rival = Contestant(double, lambda v: [short], Cost(((1, 1),)), 1e-2)
    with pytest.raises(WrongResult):
        contest(Benchmark(), Ledger(tmp_path / "f", "toy"), {}, Lineup({"ours": rival}, {"": [many]}, [(many,)]))


def test_a_wrong_kernel_has_no_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "layer-forward", "--benchmark-only"]
    plugin = ["-p", "tests.benchmarks.wrong_kernel", "--figures", str(tmp_path / "figures.jsonl"), "--scale", "toy"]
    done = subprocess.run([*command, *plugin], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 failed" in done.stdout
    assert done.stdout.count("WrongResult: hilora:") >= 3
    assert not (tmp_path / "figures.jsonl").exists()
