"""Everything that only a GPU can tell, in one call: `make gpu-report`.

In this order: all kernels compiled, their tests, each kernel by itself, the best tiles and plans (written to the table
that dispatch reads), the layer against its rivals and all other operations, a step of a ViT-B, a look by
compute-sanitizer where it is installed, tables and charts; and at the end the targets, met or missed. Each part has its
share of the time. One that fails does not keep the next from running, since the machine may be a borrowed one, and
every figure is checked for itself before it is taken. The exit status is that of the first part that failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import torch

from benchmarks.ledger import RESULTS
from benchmarks.timing import DEVICE, SCALES
from hilora.kernels.stacked_linear.devices import PATH as TABLE

ROOT = Path(__file__).parents[1]
TIMED_OUT = 124  # as the command `timeout` has it
LAST_REPORT = 20.0  # seconds for the report, and for the targets
INTERPRETED, COMPILED = ({"TRITON_INTERPRET": on} for on in "10")
TESTS = [
    "tests/kernels",
    "--deselect=tests/kernels/test_precompile.py",
    "--deselect=tests/kernels/test_emulated.py",
    "--ignore=tests/kernels/emulator",
]


class Part(NamedTuple):
    """A module to run.

    Attributes:
        share: of all the time, at most.
        environment: beside that of this process.
        before: what runs Python: a command and its options.
    """

    name: str
    share: float
    command: Sequence[object]
    environment: Mapping[str, str] = {}
    before: Sequence[str] = ()


def parts(given: argparse.Namespace) -> list[Part]:
    """All but the report and the targets, which come last."""
    toy = given.scale == "toy"
    scale, by_hand = ["--scale", given.scale], INTERPRETED if toy else {}
    arch = 80 if toy else int("".join(map(str, torch.cuda.get_device_capability())))
    workers = ["-n", "8"] if find_spec("xdist") and not toy else []
    compiled = ["hilora.kernels.precompile", "--arch", arch, *(["--dtype", "fp16"] if toy else [])]
    tests = [
        "pytest",
        "-q",
        "-p",
        "benchmarks.failures",
        *(TESTS[:1] if not toy else ["tests/kernels/test_devices.py"]),
    ]
    tests += [*(TESTS[1:] if not toy else []), *workers]
    # With "=": before it knows the option, pytest would take the path for tests, and load a conftest.py beside it.
    options = [*scale, f"--figures={given.figures}", "--budget", given.seconds * 0.25]
    found = [
        Part("all kernels compiled", 0.12, compiled, COMPILED),
        Part("the kernels' tests", 0.15, tests),
        Part("each kernel by itself", 0.12, ["benchmarks.kernels", *scale], by_hand),
        Part("tiles and plans", 0.25, ["benchmarks.tune", *scale, "--table", given.table], by_hand),
        Part("the benchmarks", 0.3, ["pytest", "-q", "benchmarks", "--benchmark-only", *options]),
        Part("a step of a ViT", 0.12, ["benchmarks.vit_step", *scale]),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        small = ["benchmarks.kernels", "--scale", "toy"]
        found.append(Part("compute-sanitizer", 0.1, small, {}, [sanitizer, "--error-exitcode", "1"]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cuda", help="which shapes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=510, help="for all together (default: %(default)s)")
    parser.add_argument("--figures", type=Path, default=RESULTS, help="the ledger to append to")
    parser.add_argument("--table", type=Path, default=TABLE, help="of plans and tiles, to write this device's row to")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    if given.scale == "cuda" and DEVICE != "cuda":
        parser.error("there is no GPU here; --scale toy tries this script without one, make bench measures the CPU")
    end = monotonic() + given.seconds
    statuses = []
    for part in parts(given):
        seconds = min(part.share * given.seconds, end - monotonic() - LAST_REPORT)
        statuses.append(run(part.name, seconds, *part.command, environment=part.environment, before=part.before))
    of_figures = ["--figures", given.figures]
    statuses.append(run("the report", LAST_REPORT, "benchmarks.report", *of_figures, "--docs", given.docs))
    statuses.append(run("the targets", LAST_REPORT, "benchmarks.targets", "--scale", given.scale, *of_figures))
    raise SystemExit(next((status for status in statuses if status), 0))


def run(
    name: str,
    seconds: float,
    *arguments: object,
    environment: Mapping[str, str] = {},
    before: Sequence[str] = (),
) -> int:
    """Run a module in a process of its own, and with it end all that it started when its time is over."""
    print(f"==== {name}, at most {seconds:.0f} s", flush=True)
    command = [*before, sys.executable, "-m", *map(str, arguments)]
    started = monotonic()
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={**os.environ, **environment}) as process:
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = {0: "done", TIMED_OUT: "stopped: its time was over"}.get(status, f"FAILED, exit status {status}")
    print(f"==== {name}: {said}, {monotonic() - started:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    main()
