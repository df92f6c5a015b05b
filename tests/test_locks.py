"""Folders for one process at a time, and work that signals end or must wait for."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hilora.files import write_text
from hilora.locks import Stopped, claimed, stoppable, uninterrupted

HOLD = """
import sys
from pathlib import Path
from typing import Any
from hilora.locks import claimed
with claimed(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""


def other_process(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=-1, stdout=-1, text=True)


@pytest.fixture(params=["flock", "no flock"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a file system without locks."""
    if request.param == "no flock":

        def flock(*given: object) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(fcntl, "flock", flock)


def test_a_folder_is_had_by_one_at_a_time(locks: None, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with claimed(folder) as first, claimed(folder) as second:
        assert (first, second) == (True, False)
    with claimed(folder) as again:
        assert again


def test_another_process_has_it_until_it_ends_however_that_is(tmp_path: Path) -> None:
    for end in ("close", "kill"):
        other = other_process(tmp_path)
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with claimed(tmp_path) as ours:
            assert not ours
        other.kill() if end == "kill" else other.communicate()
        other.wait()
        with claimed(tmp_path) as ours:
            assert ours


@pytest.mark.parametrize("locks", ["no flock"], indirect=True)
def test_the_mark_of_a_process_that_is_no_more_counts_for_nothing(locks: None, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    marks = {
        f"{socket.gethostname()} {gone.pid}": True,
        f"{socket.gethostname()} {os.getpid()}": False,
        f"elsewhere {gone.pid}": False,
        "": False,
    }
    for text, free in marks.items():
        (tmp_path / "lock").write_text(text)
        with claimed(tmp_path) as ours:
            assert ours is free, text


def test_what_a_killed_process_left_half_written_is_taken_away(tmp_path: Path) -> None:
    write_text(tmp_path / "summary.json", "{}")
    for name in (".summary.json.0123abcd.tmp", ".accuracy.png.89abcdef.tmp"):
        (tmp_path / name).write_text("half")
    with claimed(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As in a program that a terminal started: a suite in the background, or under nohup, inherits ignored ones."""
    usual: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_work_as_ctrl_c_does(number: signal.Signals) -> None:
    with pytest.raises(Stopped) as caught, stoppable():
        signal.raise_signal(number)
    assert (caught.value.signal, str(caught.value)) == (number, number.name)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stoppable(), uninterrupted():
        signal.raise_signal(signal.SIGHUP)


def test_signals_wait_for_what_belongs_together() -> None:
    steps = []

    def work() -> None:
        with stoppable():
            with uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                steps.append("written")
            steps.append("went on")

    with pytest.raises(Stopped):
        work()
    assert steps == ["written"]
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
