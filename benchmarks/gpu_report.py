"""Everything that only a GPU can tell, in one call: `make gpu-report`.

The kernels' tests, then the benchmarks, then tables and charts, each within its share of the time. A part that fails
does not keep the next from running, since the machine may be a borrowed one, and every figure is checked for itself
before it is taken. The exit status is that of the first part that failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

from benchmarks.ledger import RESULTS
from benchmarks.timing import DEVICE, SCALES

ROOT = Path(__file__).parents[1]
TIMED_OUT = 124  # as the command `timeout` has it
LAST_BENCHMARK, LAST_REPORT = 45.0, 20.0  # seconds that these may take: begun no later than so long before the end


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cuda", help="which shapes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=510, help="for all together (default: %(default)s)")
    parser.add_argument("--figures", type=Path, default=RESULTS, help="the ledger to append to")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    if given.scale == "cuda" and DEVICE != "cuda":
        parser.error("there is no GPU here; --scale toy tries this script without one, make bench measures the CPU")
    end = monotonic() + given.seconds

    toy = given.scale == "toy"
    tests = (
        ["tests/kernels/test_backends.py"]
        if toy
        else ["tests/kernels", "tests/federated/test_training.py", "--deselect", "tests/kernels/test_precompile.py"]
    )
    workers = ["-n", "8"] if find_spec("xdist") and not toy else []
    statuses = [run("the kernels' tests", given.seconds / 4, "pytest", "-q", *tests, *workers)]

    left = end - monotonic() - LAST_REPORT
    # With "=": before it knows the option, pytest would take the path for tests, and load a conftest.py beside it.
    options = ["--scale", given.scale, f"--figures={given.figures}", "--budget", max(left - LAST_BENCHMARK, 0)]
    statuses.append(run("the benchmarks", left, "pytest", "-q", "benchmarks", "--benchmark-only", *options))

    options = ["--figures", given.figures, "--docs", given.docs]
    statuses.append(run("the report", end - monotonic(), "benchmarks.report", *options))
    raise SystemExit(next((status for status in statuses if status), 0))


def run(name: str, seconds: float, module: str, *arguments: object) -> int:
    """Run a module in a process of its own, and with it end all that it started when its time is over."""
    print(f"==== {name}, at most {seconds:.0f} s", flush=True)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    started = monotonic()
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
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
