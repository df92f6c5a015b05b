"""Everything that only a GPU can tell, in one call: `make gpu-report`.

In this order: all kernels compiled, their tests, each kernel by itself, the best tiles and plans (written to the table
that dispatch reads), the benchmarks that tell most, a step of a ViT-B, a look by compute-sanitizer where it is
installed, the targets, met or missed; then the other benchmarks for as long as there is time, tables and charts, and
the targets once more. Each part has its share of the time. One that fails does not keep the next from running, since
the machine may be a borrowed one, and every figure is checked for itself before it is taken. What a part lacks a
package for is left out, and said. The exit status is that of the first part that failed.

`--out DIR` gathers what is to be carried home: `report.md` with the targets and what each part printed, the new
figures, this device's row of the table, the tables and charts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import IO, NamedTuple

import torch

from benchmarks.ledger import RESULTS
from benchmarks.timing import DEVICE, SCALES
from hilora.files import write_json, write_text
from hilora.kernels.stacked_linear.devices import PATH as TABLE
from hilora.reporting.machine import device_name, today

ROOT = Path(__file__).parents[1]
TIMED_OUT = 124  # as the command `timeout` has it
LAST_REPORT = 20.0  # seconds for the report, and for the targets
GRACE = 3.0  # seconds to read on for, where something that left the group still has the pipe
BEGUN = 0.8  # of a part's time, after which it begins no further benchmark
SHOWN = 20_000  # characters of what a part printed, of its beginning and of its end, that are carried home
INTERPRETED, COMPILED = ({"TRITON_INTERPRET": on} for on in "10")
PYTEST = ["pytest", "-q", "-rs", "-p", "benchmarks.failures"]
TESTS = ["tests/kernels", "--ignore=tests/kernels/emulator"]
TESTS += [f"--deselect=tests/kernels/test_{name}.py" for name in ("precompile", "emulated", "account")]  # need no GPU
OF_SM_90 = ["tests/kernels/emulator/hopper_kernels.py", "-k", "every_gradient or every_combination"]


class Part(NamedTuple):
    """A module to run.

    Attributes:
        share: of all the time, at most; None for all that is left.
        environment: beside that of this process.
        before: what runs Python: a command and its options.
        budgeted: whether it has to be told its time.
    """

    name: str
    share: float | None
    command: Sequence[object]
    environment: Mapping[str, str] = {}
    before: Sequence[str] = ()
    budgeted: bool = False


class Ran(NamedTuple):
    """What became of a part."""

    name: str
    status: int
    said: str  # how it ended
    printed: str


def parts(given: argparse.Namespace) -> list[Part]:
    """All but the report and the targets, which come last."""
    toy = given.scale == "toy"
    scale, by_hand = ["--scale", given.scale], INTERPRETED if toy else {}
    arch = 80 if toy else int("".join(map(str, torch.cuda.get_device_capability())))
    workers = ["-n", "8"] if find_spec("xdist") and not toy else []
    compiled = ["hilora.kernels.precompile", "--arch", arch, *(["--dtype", "fp16"] if toy else [])]
    tests = ["tests/kernels/test_devices.py"] if toy else TESTS
    # With "=": before it knows the option, pytest would take the path for tests, and load a conftest.py beside it.
    bench = [*PYTEST, "benchmarks", "--benchmark-only", *scale, f"--figures={given.figures}"]
    small = ["benchmarks.kernels", "--scale", "toy"]
    sanitizer = shutil.which("compute-sanitizer")
    checked = [sanitizer, "--error-exitcode", "1", "--report-api-errors", "no"] if sanitizer else []
    found = [
        Part("all kernels compiled", 0.07, compiled, COMPILED),
        Part("the tests of sm_90's own kernels", 0.05, [*PYTEST, *OF_SM_90, *workers]),
        Part("the kernels' tests", 0.1, [*PYTEST, *tests, *workers]),
        Part("each kernel by itself", 0.06, ["benchmarks.kernels", *scale], by_hand),
        Part("tiles and plans", 0.2, ["benchmarks.tune", *scale, "--table", given.table], by_hand),
        Part("the benchmarks that tell most", 0.18, [*bench, "--cases", "first"], budgeted=True),
        Part("a step of a ViT", 0.08, ["benchmarks.vit_step", *scale]),
        Part("compute-sanitizer", 0.07, small, {}, checked),
        targets(given)._replace(share=0.02),
        Part("the other benchmarks", None, [*bench, "--cases", "rest"], budgeted=True),
    ]
    absent = {"the tests of sm_90's own kernels": arch != 90, "compute-sanitizer": sanitizer is None}
    return [part for part in found if not absent.get(part.name)]


def targets(given: argparse.Namespace) -> Part:
    return Part("the targets", None, ["benchmarks.targets", "--scale", given.scale, "--figures", given.figures])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cuda", help="which shapes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=510, help="for all together (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="to gather what is to be carried home")
    parser.add_argument("--figures", type=Path, help="the ledger to append to (default: in --out, or the repository's)")
    parser.add_argument("--table", type=Path, default=TABLE, help="of plans and tiles, to write this device's row to")
    parser.add_argument("--docs", type=Path, help="folder of tables and charts (default: --out, or docs)")
    given = parser.parse_args(arguments)
    if given.scale == "cuda" and DEVICE != "cuda":
        parser.error("there is no GPU here; --scale toy tries this script without one, make bench measures the CPU")
    end = monotonic() + given.seconds
    out = given.out.resolve() if given.out else None  # the parts run in the repository
    given.figures = (given.figures or (out / "figures.jsonl" if out else RESULTS)).resolve()
    given.docs = (given.docs or out or ROOT / "docs").resolve()
    given.table = given.table.resolve()
    reported = Part("the report", None, ["benchmarks.report", "--figures", given.figures, "--docs", given.docs])
    ran: list[Ran] = []

    def go(part: Part, seconds: float) -> None:
        ran.append(run(part, seconds))
        if out:
            gather(out, given.table, ran)

    for part in parts(given):
        left = end - 2 * LAST_REPORT - monotonic()
        go(part, left if part.share is None else min(left, part.share * given.seconds))
    for part in (reported, targets(given)):
        go(part, LAST_REPORT)
    raise SystemExit(next((one.status for one in ran if one.status), 0))


def run(part: Part, seconds: float) -> Ran:
    """Run a part in a process of its own, and with it end all that it started when its time is over."""
    if seconds < 1:
        print(f"==== {part.name}: left out: no time is left", flush=True)
        return Ran(part.name, TIMED_OUT, "left out: no time is left", "")
    print(f"==== {part.name}, at most {seconds:.0f} s", flush=True)
    command = [*part.before, sys.executable, "-m", *map(str, part.command)]
    command += ["--budget", str(BEGUN * seconds)] if part.budgeted else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    started, lines = monotonic(), list[str]()
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    reader = Thread(target=_pass_on, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
        reader.join(GRACE)
    said = {0: "done", TIMED_OUT: "stopped: its time was over"}.get(status, f"FAILED, exit status {status}")
    said += f", {monotonic() - started:.0f} s"
    print(f"==== {part.name}: {said}", flush=True)
    return Ran(part.name, status, said, "".join(lines))


def _pass_on(source: IO[str], lines: list[str]) -> None:
    with source:
        for line in source:
            print(line, end="", flush=True)
            lines.append(line)


def gather(out: Path, table: Path, ran: Sequence[Ran]) -> None:
    """What has been found so far: the report, with the targets first, and this device's row."""
    name = device_name(torch.device(DEVICE))
    found = [one for one in ran if one.name == "the targets"][-1:]
    logs = [one for one in ran if one.name != "the targets"]
    texts = [f"## {one.name}: {one.said}\n\n```text\n{_shortened(one.printed)}```\n" for one in found + logs]
    write_text(out / "report.md", "\n".join([f"# {name}, {today()}\n", *texts]))
    row = json.loads(table.read_text()).get(name) if table.exists() else None
    if row is not None:
        write_json(out / "device.json", {name: row})


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * SHOWN
    return text if left_out <= 0 else f"{text[:SHOWN]}\n... {left_out} characters ...\n{text[-SHOWN:]}"


if __name__ == "__main__":
    main()
