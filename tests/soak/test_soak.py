"""A share of the kills of `make soak`, and the harness itself: it must see what it looks for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.soak.run import COMMANDS, soak

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", list(COMMANDS))
def test_what_is_killed_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    assert soak(name, kills=15, seed=1, scratch=tmp_path) == []


def test_a_file_that_a_kill_leaves_behind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(folder: Path) -> int:
        folder.mkdir(exist_ok=True)
        begun = folder / "begun"
        if not begun.exists():
            begun.touch()
            time.sleep(0.3)
            begun.unlink()
        return 0

    monkeypatch.setitem(COMMANDS, "forgetful", forgetful)
    wrong = soak("forgetful", kills=3, seed=0, scratch=tmp_path)
    assert "begun is b'', was not there" in wrong[0]
