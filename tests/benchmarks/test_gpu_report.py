"""The script that meets a GPU, from end to end without one."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest
import torch

from benchmarks import gpu_report, targets
from benchmarks.ledger import read
from benchmarks.operations import operations
from benchmarks.operations.layer import WIDTHS, shapes
from benchmarks.test_bench import cases
from benchmarks.timing import SCALES
from hilora.kernels import precompile
from hilora.kernels.stacked_linear import devices
from hilora.version import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FIVE = {"PEFT", "PEFT, compiled", "stacked addmm", "merged + 1 LoRA", "frozen layer"}


def test_a_toy_run(tmp_path: Path) -> None:
    table = tmp_path / "devices.json"
    table.write_text(devices.PATH.read_text())
    out = tmp_path / "out"
    where = ["--out", str(out), "--table", str(table), "--seconds", "1500"]
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--scale", "toy", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done, ") == 10 + bool(shutil.which("compute-sanitizer"))
    (own,) = json.loads(table.read_text()).keys() - json.loads(devices.PATH.read_text()).keys()
    assert json.loads((out / "device.json").read_text()) == {own: json.loads(table.read_text())[own]}
    source = json.loads(table.read_text())[own]["source"]
    assert source.startswith("measured ")
    assert source.endswith(": tiles of rows, tiles of gemm, plans")
    carried = (out / "report.md").read_text()
    headings = [line for line in carried.splitlines() if line.startswith("#")]
    assert headings[0].startswith(f"# {own}, 20")
    assert [heading.partition(":")[0] for heading in headings[1:4]] == [
        "## the targets",
        "## all kernels compiled",
        "## the kernels' tests",
    ]
    assert "layer, step, over the frozen layer" in carried
    assert "not measured" not in carried
    found = read(out / "figures.jsonl")
    first = shapes("toy")[0]._asdict()
    for phase in ("forward", "step"):
        rivals = {
            f["rival"] for f in found if f["op"] == "layer" and f["phase"] == phase and first.items() <= f.items()
        }
        assert rivals >= FIVE | {"hilora", "hilora, whole qkv"}
    assert {f["op"] for f in found} == set(operations())
    assert len(list(out.glob("benchmarks/*.png"))) == 3
    assert "32 | 24 | 2 | 2 × 8" in (out / "benchmarks.md").read_text()
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 2**21


def test_a_clone_without_packages_that_a_machine_may_lack(tmp_path: Path) -> None:
    """Those of the federation, and the library's own metadata: what can be measured without them is."""
    lacking = ("pydantic", "peft", "flwr", "shtab", "matplotlib", "transformers")
    hidden = tmp_path / "packages"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE.format(lacking))
    path = os.pathsep.join(filter(None, [str(hidden), os.environ.get("PYTHONPATH")]))

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ledger = tmp_path / "figures.jsonl"
    said = run("pytest", "benchmarks", "--benchmark-only", "--scale", "toy", f"--figures={ledger}")
    found = read(ledger)
    assert {figure["op"] for figure in found} == {"layer", "penalty", "distances"}
    assert {"hilora", "stacked addmm", "frozen layer"} <= {figure["rival"] for figure in found}
    assert found[0]["hilora"].startswith(__version__)
    assert found[0]["peft"] == "none"
    assert "left out: round, since pydantic is not installed" in said
    assert re.search("PEFT +left out: peft is not installed", said)
    said = run("benchmarks.targets", "--scale", "toy", "--figures", ledger)
    assert re.search("layer, forward, over the frozen layer .* (met|MISSED)", said)
    assert re.search("unequal ranks, over equal ones .* not measured, since pydantic is not installed", said)
    run("benchmarks.report", "--figures", ledger, "--docs", tmp_path)
    assert "round (pydantic)" in (tmp_path / "benchmarks.md").read_text()
    run("benchmarks.gpu_report", "--help")


HIDE = """
import sys
from importlib.metadata import Distribution
lacking = {}
sys.modules.update(dict.fromkeys(lacking))
discover = Distribution.discover.__func__
hidden = {{*lacking, "hilora"}}
Distribution.discover = classmethod(lambda c, **k: (d for d in discover(c, **k) if d.metadata["Name"] not in hidden))
"""


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[gpu_report.Part]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    return gpu_report.parts(argparse.Namespace(scale="cuda", figures=tmp_path / "figures.jsonl", table=tmp_path))


def test_what_counts_most_comes_first_and_all_have_time(on_a_gpu: list[gpu_report.Part]) -> None:
    names = [part.name for part in on_a_gpu]
    order = ("the benchmarks that tell most", "a step of a ViT", "compute-sanitizer", "the targets")
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    assert [part.name for part in on_a_gpu if part.share is None] == names[-1:]
    assert sum(part.share or 0 for part in on_a_gpu) <= 0.95 - 2 * gpu_report.LAST_REPORT / 510
    first, rest = cases("cuda")
    assert [(name, phase) for name, phase, _ in first] == [
        *(("layer", phase) for _ in range(2) for phase in ("forward", "step")),
        ("penalty", "step"),
        *(("distances", phase) for phase in ("forward",)),
    ]
    assert [shape.groups for name, _, shape in first if name == "layer"] == [1, 1, 16, 16]
    assert not set(first) & set(rest)
    every = {(n, p, s) for n, one in operations().items() for p in one.phases for s in one.shapes("cuda")}
    assert {*first, *rest} == every


def test_the_kernels_of_sm_90_are_tested_and_looked_at_by_the_sanitizer(on_a_gpu: list[gpu_report.Part]) -> None:
    by_name = {part.name: part for part in on_a_gpu}
    command = by_name["the tests of sm_90's own kernels"].command
    chosen = [str(word) for word in command[: command.index("-k") + 2]]
    collected = subprocess.run(
        [sys.executable, "-m", *chosen, "--collect-only", "-p", "no:xdist"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert collected.stdout.count("::test_forward_and_every_gradient[") == 6, collected.stdout + collected.stderr
    assert collected.stdout.count("::test_every_combination_in_training[") == 8
    assert by_name["compute-sanitizer"].before[-2:] == ["--report-api-errors", "no"]
    code = inspect.cleandoc("""
        import triton
        from benchmarks import kernels, layer_calls
        from hilora.kernels import launch, precompile
        triton.runtime.driver.set_active(precompile.Pretended(90))
        names = set()
        launch.launcher = lambda kernel, *rest: names.add(kernel.__name__)
        layer_calls.passes(*kernels.SHAPES["toy"], "fused").step()
        print(sorted(names))
    """)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "['backward_tiles', 'forward_tiles', 'pack', 'sum_by_slot']\n", done.stderr
    assert "--deselect=tests/kernels/test_account.py" in by_name["the kernels' tests"].command


def test_every_part_can_be_asked_for_on_a_newer_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for capability in ((10, 3), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)  # noqa: B023
        found = gpu_report.parts(argparse.Namespace(scale="cuda", figures=tmp_path, table=tmp_path))
        assert found[0].command[-1] in precompile.SHARED_MEMORY
        assert "the tests of sm_90's own kernels" not in {part.name for part in found}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_report.main([])
    assert "no GPU here" in capsys.readouterr().err


def once(name: str, code: str) -> gpu_report.Part:
    return gpu_report.Part(name, None, ["timeit", "-n1", "-r1", code])


def test_a_part_whose_time_is_over_is_ended_with_its_children(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import os, time; print('begun'); os.fork(); time.sleep(60)"
    started = monotonic()
    ran = gpu_report.run(once("a long one", code), 2)
    assert monotonic() - started < 30
    assert (ran.status, ran.printed.splitlines()[:1]) == (gpu_report.TIMED_OUT, ["begun"])
    assert "its time was over" in capsys.readouterr().out


def test_what_leaves_the_group_of_a_part_is_not_waited_for() -> None:
    code = "import os, time; print('begun'); os.fork() or (os.setsid(), time.sleep(40))"
    started = monotonic()
    ran = gpu_report.run(once("one with a stray", code), 20)
    assert monotonic() - started < 35
    assert "begun\n" in ran.printed


def test_a_part_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    ran = gpu_report.run(once("a failure", "raise ValueError"), 20)
    assert ran.status == 1
    assert "raise ValueError" in ran.printed
    assert "FAILED, exit status 1" in capsys.readouterr().out


def test_a_part_without_time_is_left_out() -> None:
    ran = gpu_report.run(once("too late", "print('begun')"), -3)
    assert (ran.status, ran.printed) == (gpu_report.TIMED_OUT, "")
    assert "no time is left" in ran.said


def test_targets_of_which_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets.main(["--scale", "toy", "--figures", str(tmp_path / "none.jsonl")])
    assert capsys.readouterr().out.count("not measured") == len(targets.TARGETS["toy"])


def test_what_is_carried_home_is_short(tmp_path: Path) -> None:
    long = gpu_report.Ran("a long one", 1, "FAILED", "begun\n" + "x" * 10**6 + "\nended\n")
    first, last = (gpu_report.Ran("the targets", 0, "done", text) for text in ("not yet\n", "met\n"))
    gpu_report.gather(tmp_path, tmp_path / "none.json", [first, long, last])
    text = (tmp_path / "report.md").read_text()
    assert len(text) < 2.1 * gpu_report.SHOWN
    assert text.index("met") < text.index("begun") < text.index("ended")
    assert "not yet" not in text
    assert not (tmp_path / "device.json").exists()


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
