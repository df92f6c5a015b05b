"""The bar, and what the library logs, on a terminal."""

import io
import logging
import subprocess
import sys

import pytest

from hilora.reporting.progress import Progress, log, on_terminal, say
from tests.reporting.test_plots import make_record


def test_progress_away_from_a_terminal_prints_a_line_a_stage(capsys):
    with Progress(4, "hilora") as progress:
        for record in (make_record(1), make_record(2), make_record(3, "cluster", 1, 0.75)):
            progress.round(record)
        log.info("5 clusters")
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
        log.info("a note")
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


def test_what_is_said_fits_a_terminal_that_knows_ascii_only(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    with Progress(1, "x"):
        log.info("a – %s", "b")
    say("ρ")
    assert stdout.buffer.getvalue() == b"a ? b\n?\n"


def test_the_log_is_shown_once_and_only_inside_of_the_block(capsys):
    log.info("before")
    with on_terminal(), on_terminal(), Progress(1, "x"):
        logging.getLogger("hilora.federated").info("inside")
        log.debug("a detail")
    log.info("after")
    assert capsys.readouterr().out == "inside\n"
    assert not any(type(handler).__module__.startswith("hilora") for handler in log.handlers)


def test_importing_the_library_leaves_the_log_to_others():
    code = "import logging, hilora.reporting.progress as p; print(p.log is logging.getLogger('hilora'), p.log.handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"
