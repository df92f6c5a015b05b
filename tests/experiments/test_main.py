"""The commands as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hilora.experiments.__main__ import main
from hilora.experiments.schema import SCHEMA
from hilora.reporting.progress import Progress
from tests.experiments.conftest import SMALL

pytestmark = pytest.mark.slow


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_from_a_file_to_a_page(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "small.toml", "--only", "mixed"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Small: 2 runs to do"
    assert len(said) == 3  # a line a run
    assert said[2].startswith("mixed/fedit final seed 0: test ")
    lines = [json.loads(text) for text in (tmp_path / "small.ledger.jsonl").read_text().splitlines()]
    assert [line["key"]["method"] for line in lines] == ["hilora", "fedit"]
    folder = tmp_path / "runs" / "experiments" / "small"
    logs = sorted(folder.glob("mixed.*/log.txt"))
    assert len(logs) == 2
    assert "root done" in logs[0].read_text()
    assert main(["report", "small.toml"]) == 0
    assert (folder / "report" / "report.html").is_file()
    report = (folder / "report" / "report.md").read_text()
    assert "2 of 6 final runs" in report
    assert f"{100 * lines[1]['results']['final']['mean']:.1f}" in report


def test_two_shards_do_all_between_them(file: Path, tmp_path: Path) -> None:
    for shard in ("1/2", "2/2"):
        assert main(["run", "small.toml", "--only", "mixed", "--shard", shard]) == 0
    lines = (tmp_path / "small.ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"]["method"] for line in lines] == ["hilora", "fedit"]


def test_interrupted_and_failed_runs_have_exit_codes_of_their_own(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Progress, record: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "round", stop)
        assert main(["run", "small.toml", "--only", "mixed/fedit"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    file.write_text(SMALL.replace("clients = 4", "clients = 4000"))
    assert main(["run", "small.toml", "--only", "mixed/fedit"]) == 1
    assert "failed: mixed/fedit final seed 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.toml"], "there is no experiment none.toml"),
        (["run", "small.toml", "--only", "mixed/fedlit"], "--only mixed/fedlit.*groups/hilora"),
        (["report", "small.toml", "--into", "none.md"], "none.md"),
        (["migrate", "small.toml"], "there is no ledger small.ledger.jsonl"),
    ],
)
def test_mistakes_end_in_one_line(
    file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


def test_data_that_are_not_there_are_named_before_anything_is_trained(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(SMALL.replace('data = "glyphs"\npartition = "gl-dir"', 'data = "cifar"\npartition = "gl-dir"'))
    assert main(["run", "small.toml", "--data-dir", "elsewhere"]) == 2
    assert "elsewhere does not hold cifar" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_data_of_other_settings_may_be_missing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SMALL.replace('data = "glyphs"\npartition = "sc-dir"', 'data = "cifar"\npartition = "sc-dir"'))
    assert main(["run", "small.toml", "--only", "mixed/fedit"]) == 0
    assert main(["run", "small.toml", "--shard", "1/4"]) == 2
    assert "does not hold cifar" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_stops_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("work").write_text("a file")
    assert main(["run", "small.toml", "--work", "work"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "Small: 6 runs to do\n"
    assert captured.err.startswith("error: stopped at groups/hilora final seed 0: ")
    assert captured.err.count("\n") == 1


def test_an_older_ledger_is_rewritten(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decides = {"strategy": "fedit", "run": {}, "partition": {"scheme": "gl-dir"}, "data": "glyphs", "model": {}}
    about = dict.fromkeys(("date", "revision", "torch", "device", "dtype"), "x")
    path = tmp_path / "small.ledger.jsonl"
    path.write_text(json.dumps({"key": {}, "decides": decides, "results": {}, **about}) + "\n")
    for count in (1, 0):
        assert main(["migrate", "small.toml"]) == 0
        assert capsys.readouterr().out == f"small.ledger.jsonl: {count} lines rewritten\n"
    assert json.loads(path.read_text())["decides"]["schema"] == SCHEMA


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_shard_that_does_not_exist(file: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "small.toml", "--shard", text])
    assert caught.value.code == 2
    assert "expected I/N" in capsys.readouterr().err


def test_a_torn_ledger_is_told(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.ledger.jsonl").write_text('{"key": {"sett')
    assert main(["report", "small.toml"]) == 0
    assert "passed over what is no record, line 1" in capsys.readouterr().err


def test_help_names_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "hilora.experiments", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("run FILE.toml --data-dir", "report FILE.toml", "migrate FILE.toml", "ledger"):
        assert word in done.stdout
