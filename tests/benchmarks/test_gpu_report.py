"""The script that meets a GPU, from end to end without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.ledger import read
from benchmarks.operations import operations
from benchmarks.operations.layer import WIDTHS, shapes
from benchmarks.timing import SCALES
from hilora.kernels.stacked_linear import devices

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FIVE = {"PEFT", "PEFT, compiled", "stacked addmm", "merged + 1 LoRA", "frozen layer"}


def test_a_toy_run(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text((ROOT / "docs" / "benchmarks.md").read_text())
    ledger = tmp_path / "figures.jsonl"
    table = tmp_path / "devices.json"
    table.write_text(devices.PATH.read_text())
    where = ["--figures", str(ledger), "--docs", str(tmp_path), "--table", str(table)]
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--scale", "toy", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done, ") == 8
    (own,) = json.loads(table.read_text()).keys() - json.loads(devices.PATH.read_text()).keys()
    assert json.loads(table.read_text())[own]["source"].startswith("measured ")
    assert "layer, step, over the frozen layer" in done.stdout
    assert "not measured" not in done.stdout
    found = read(ledger)
    first = shapes("toy")[0]._asdict()
    for phase in ("forward", "step"):
        rivals = {
            f["rival"] for f in found if f["op"] == "layer" and f["phase"] == phase and first.items() <= f.items()
        }
        assert rivals >= FIVE | {"hilora", "hilora, whole qkv"}
    assert {f["op"] for f in found} == set(operations())
    assert len(list(tmp_path.glob("benchmarks/*.png"))) == 3
    assert "32 | 24 | 2 | 2 × 8" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_report.main([])
    assert "no GPU here" in capsys.readouterr().err


def test_a_part_whose_time_is_over_is_ended_with_its_children(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        gpu_report.run("a long one", 1, "timeit", "-n1", "-r1", "import time; time.sleep(60)") == gpu_report.TIMED_OUT
    )
    assert "its time was over" in capsys.readouterr().out


def test_a_part_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.run("a failure", 20, "timeit", "-n1", "-r1", "raise ValueError") == 1
    assert "FAILED, exit status 1" in capsys.readouterr().out


def test_nothing_is_begun_after_the_budget(tmp_path: Path) -> None:
    options = ["--scale", "toy", "--budget", "0", "--figures", str(tmp_path / "figures.jsonl")]
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-rs", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "the budget of 0 s is spent" in done.stdout
    assert " passed" not in done.stdout
    assert not (tmp_path / "figures.jsonl").exists()


def test_every_scale_has_shapes_that_groups_divide() -> None:
    for scale in SCALES:
        assert all(operation.shapes(scale) for operation in operations().values())
        found = shapes(scale)
        assert len(set(found)) == len(found)
        for shape in found:
            assert shape.rows % shape.groups == 0
    cuda = shapes("cuda")
    for groups in (1, 4, 16):
        widths_and_rows = {(s.width, s.rows) for s in cuda if s.groups == groups and s.form == "qkv"}
        assert {width for width, _ in widths_and_rows} == set(WIDTHS.values())
        assert len({rows for _, rows in widths_and_rows}) == 3
