"""Options of the benchmarks, and what they found, printed and entered in the ledger."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import pytest

from benchmarks.ledger import RESULTS, Ledger
from benchmarks.operations import left_out
from benchmarks.timing import DEVICE, SCALES
from hilora.models.backbone import tune_for_cpu


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hilora")
    group.addoption("--scale", choices=SCALES, default=DEVICE, help="which shapes (default: as the device)")
    group.addoption(
        "--cases", choices=("all", "first", "rest"), default="all", help="those that tell most, or the rest"
    )
    group.addoption("--figures", type=Path, default=RESULTS, help="the ledger to append to")
    group.addoption("--budget", type=float, help="seconds after which no further benchmark is begun")


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Ledger:
    return Ledger(request.config.getoption("figures"), request.config.getoption("scale"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Freed memory is kept, as a training run keeps it: else every rival's large tensors cost page faults first."""
    session.config.stash[STARTED] = monotonic()
    if DEVICE == "cpu":
        tune_for_cpu()


STARTED = pytest.StashKey[float]()


@pytest.fixture(autouse=True)
def _within_budget(request: pytest.FixtureRequest) -> None:
    budget = request.config.getoption("budget")
    if budget is not None and monotonic() - request.config.stash[STARTED] > budget:
        pytest.skip(f"the budget of {budget:g} s is spent")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = [benchmark for benchmark in getattr(session, "benchmarks", []) if benchmark.extra_info]
    if found:
        terminalreporter.section("medians, side by side in one run")
    for benchmark in found:
        terminalreporter.write_line(benchmark.name)
        for name, value in benchmark.extra_info.items():
            terminalreporter.write_line(f"    {name:24}{value}")
    for operation, package in left_out().items():
        terminalreporter.write_line(f"left out: {operation}, since {package} is not installed")
