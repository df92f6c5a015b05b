"""Where and with what something was computed."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import Distribution, version
from pathlib import Path

import pytest
import torch

from hilora.reporting import machine
from hilora.reporting.machine import device_name, revision, today, versions
from hilora.version import __version__


def test_the_device_and_its_threads() -> None:
    count = torch.get_num_threads()
    assert device_name(torch.device("cpu")).endswith(f"{count} thread" + ("s" if count > 1 else ""))


def test_the_version_and_the_commit() -> None:
    folder = machine.PACKAGE
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    assert revision().startswith(f"{__version__} {commit.stdout.strip()}".strip())


def test_a_clone_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distribution, "discover", lambda **context: iter(()))
    assert revision().startswith(__version__)
    assert versions("torch", "hilora") == {"torch": "none", "hilora": "none"}


def test_a_changed_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "hilora"
    package.mkdir()
    (package / "__init__.py").touch()
    run = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "c"]):
        subprocess.run([*run, *command], cwd=tmp_path, check=True)
    (tmp_path / "more").mkdir()
    monkeypatch.setattr(machine, "PACKAGE", package)
    assert not revision(tmp_path / "more").endswith("+")
    (tmp_path / "more" / "a.py").touch()
    assert not revision().endswith("+")
    assert revision(tmp_path / "more").endswith("+")
    (package / "__init__.py").write_text("changed")
    assert revision().endswith("+")


def test_versions_and_the_date() -> None:
    assert versions("torch") == {"torch": version("torch")}
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", today())
