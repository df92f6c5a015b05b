"""Compiled kernels in the emulator, in processes of their own: what runs them is chosen as they are defined."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "emulator"
ARCHITECTURES = ("sm_90", "sm_80")
EVERYWHERE = ("emulated_kernels.py", "broken_kernels.py", "descriptor_kernels.py")
ON_ONE = (("hopper_kernels.py", "sm_90"), ("float8_kernels.py", "sm_90"))
ROOT = FOLDER.parents[2]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton's launcher is compiled by gcc")
@pytest.mark.parametrize(("file", "architecture"), [*itertools.product(EVERYWHERE, ARCHITECTURES), *ON_ONE])
def test_in_the_emulator(file: str, architecture: str, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--emulate"):
        pytest.skip("all tests of kernels are in the emulator")
    alone = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "--emulate", architecture, *alone]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
