"""A share of the damaged files of `make fuzz`, and the harness itself: it must see what it looks for."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hilora.errors import FileError
from tests.fuzz import run
from tests.fuzz.mutation import mutated
from tests.fuzz.run import confined
from tests.fuzz.targets import MARK, TARGETS, Target

pytestmark = pytest.mark.slow

FILES = 25  # of each kind


@pytest.mark.parametrize("name", list(TARGETS))
def test_damaged_files_are_refused_or_read(name: str) -> None:
    counts, wrong = confined(name, seed=1, files=FILES)
    assert not wrong, "\n".join(wrong)
    assert counts.total() == FILES
    assert counts[run.REFUSED] > 0 or name == "ledger"  # which passes over what is no record


def _file(folder: Path) -> Path:
    (folder / "file").write_bytes(b"content " * 20)
    return folder / "file"


def _runs_code(path: Path) -> Any:
    os.mkdir(MARK)
    raise FileError(str(path))


def _takes_memory(path: Path) -> Any:
    try:
        return bytearray(8 * run.GIBIBYTE)
    except MemoryError as error:
        raise FileError(str(path)) from error


def _hangs(path: Path) -> Any:
    time.sleep(60)


def _names_nothing(path: Path) -> Any:
    raise FileError("it is wrong")


def _raises_another(path: Path) -> Any:
    raise KeyError(path)


def _says_anything(path: Path) -> Any:
    return path.read_bytes()


WRONG = {
    "has run": Target(_file, _runs_code, refused=True),
    "takes all memory": Target(_file, _takes_memory, refused=True),
    "another error: .*Hang": Target(_file, _hangs, refused=True),
    "does not name the file": Target(_file, _names_nothing, refused=True),
    "another error: .*KeyError": Target(_file, _raises_another, refused=True),
    "in silence": Target(_file, _says_anything, checked=True),
}


@pytest.mark.parametrize("fault", list(WRONG))
def test_a_reader_with_a_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "faulty", WRONG[fault])
    monkeypatch.setattr(run, "SECONDS", 1)
    _, wrong = confined("faulty", seed=0, files=2)
    assert wrong
    for text in wrong:
        assert re.search(fault, text, re.DOTALL)


def test_the_same_seed_gives_the_same_damages() -> None:
    content = bytes(range(256)) * 4
    first, again, other = (mutated(content, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sum(mutated(content, random.Random(seed)) == content for seed in range(200)) < 20
