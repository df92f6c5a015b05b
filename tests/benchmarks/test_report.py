"""From the ledger to the tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.figures import Comparison, by_device
from benchmarks.ledger import read
from benchmarks.operations.layer import OPERATION, shapes

TEXT = "before\n{}\nold\n{}\nbetween\n{}\nold\n{}\nafter\n".format(*report.HEADLINE, *report.EVERYTHING)


def figure(rival: str, ms: float, **more: Any) -> dict[str, Any]:
    shape = shapes(more.get("scale", "toy"))[0]._asdict()
    conditions = {"run": "1", "date": "2026-01-01", "scale": "toy", "device": "a CPU", "hilora": "1", "torch": "2"}
    versions = {"triton": "3", "peft": "0.2", "tflops": 1.0, "gb_per_s": 10.0}
    measured = {"rival": rival, "ms": ms, "floor_ms": 0.5, "peak_mb": ms}
    return {**conditions, **versions, "op": "layer", "phase": "step", **shape, **measured, **more}


def write(folder: Path, figures: list[dict[str, Any]]) -> list[str]:
    """The files that a report needs, and its arguments."""
    (folder / "figures.jsonl").write_text("".join(json.dumps(one) + "\n" for one in figures))
    (folder / "benchmarks.md").write_text(TEXT)
    return ["--figures", f"{folder}/figures.jsonl", "--docs", str(folder)]


def test_ratios_are_of_one_run() -> None:
    figures = [
        figure(rival, ms, run=run)
        for run, times in {"1": (1.0, 2.0), "2": (10.0, 30.0), "3": (2.0, 5.0)}.items()
        for rival, ms in zip(("hilora", "PEFT"), times, strict=True)
    ]
    (device,) = by_device([*figures, figure("PEFT", 99.0, run="4")])
    ((_, comparison),) = device.comparisons.items()
    assert comparison.ratio("PEFT") == (2.5, 2.0, 3.0)
    assert str(comparison.ratio("PEFT")) == "2.50 (2.00–3.00)"
    assert comparison.ratio("frozen layer") is None
    assert comparison.median("hilora") == 2.0


def test_only_the_newest_code_of_each_device_counts() -> None:
    figures = [
        figure("hilora", 9.0, run="1", hilora="0"),
        figure("hilora", 2.0, run="2"),
        figure("hilora", 1.0, run="3", device="a GPU", scale="cuda"),
    ]
    gpu, cpu = by_device(figures)
    assert [gpu.conditions["device"], cpu.conditions["device"]] == ["a GPU", "a CPU"]
    assert [c.median("hilora") for c in cpu.comparisons.values()] == [2.0]
    assert cpu.runs == 1


def test_report_exchanges_what_is_between_the_markers(tmp_path: Path) -> None:
    rivals = {"hilora": 2.0, "PEFT": 5.0, "frozen layer": 1.0}
    figures = [figure(rival, ms, phase=phase) for rival, ms in rivals.items() for phase in OPERATION.phases]
    report.main(write(tmp_path, figures))
    text = (tmp_path / "benchmarks.md").read_text()
    assert "old" not in text
    before, headline, between, everything, after = re.split(r"<!-- /?(?:headline|benchmarks) -->", text)
    assert (before, between, after) == ("before\n", "\nbetween\n", "\nafter\n")
    assert report.TO_COME in headline
    assert "| PEFT | 2.50 | 2.50 |" in headline
    assert "| frozen layer | 0.50 | 0.50 |" in headline
    assert "| 2 | 25% | – | 2.50 |" in everything
    for name in ("rivals", "curves", "memory"):
        assert (tmp_path / f"benchmarks/a-cpu-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"benchmarks/a-cpu-{name}.png" in everything


def test_a_run_that_was_cut_short_has_tables_without_charts(tmp_path: Path) -> None:
    report.main(write(tmp_path, [figure("hilora", 1.0, phase="forward"), figure("PEFT", 3.0, phase="forward")]))
    assert "3.00" in (tmp_path / "benchmarks.md").read_text()
    assert not list(tmp_path.glob("benchmarks/*.png"))


def test_nothing_is_to_come_once_a_gpu_has_spoken(tmp_path: Path) -> None:
    figures = [figure("hilora", 1.0, phase=phase, scale="cuda", device="a GPU") for phase in OPERATION.phases]
    report.main(write(tmp_path, figures))
    assert report.TO_COME not in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("figures.jsonl", '{"run": "1"}\n{"ru', "line 2: not a figure"),
        ("figures.jsonl", "", "holds no figures"),
        ("benchmarks.md", "no markers", "needs a line"),
        ("benchmarks.md", TEXT.replace(report.HEADLINE[1], ""), "needs a line"),
        ("benchmarks.md", TEXT.replace(report.EVERYTHING[1], ""), "needs a line"),
    ],
)
def test_files_that_do_not_serve(tmp_path: Path, file: str, content: str, message: str) -> None:
    arguments = write(tmp_path, [figure("hilora", 1.0)])
    (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit, match=message):
        report.main(arguments)
    assert (tmp_path / file).read_text() == content


def test_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="missing"):
        report.main(["--figures", str(tmp_path / "missing.jsonl")])


def test_the_ledger_of_the_repository_can_be_read() -> None:
    assert by_device(read())


def test_a_ratio_of_nothing() -> None:
    assert Comparison().ratio("PEFT") is None


def test_figures_of_an_operation_that_is_gone_are_left_out() -> None:
    (device,) = by_device([figure("hilora", 1.0), {"op": "gone", "device": "another", "run": "2"}])
    assert [key[0] for key in device.comparisons] == ["layer"]
