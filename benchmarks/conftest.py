"""Options of the benchmarks, and what they found, printed and entered in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, runtime_checkable

import pytest

from benchmarks import shapes
from benchmarks.ledger import RESULTS, Ledger
from benchmarks.timing import DEVICE
from hilora.models.backbone import tune_for_cpu

SHAPES: dict[str, Callable[[str], Sequence[tuple[object, ...]]]] = {
    "test_layer": shapes.layers,
    "test_penalty": shapes.penalties,
    "test_distances": shapes.distances,
    "test_round": shapes.rounds,
    "test_cohort": shapes.cohorts,
    "test_population": shapes.populations,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hilora")
    group.addoption("--scale", choices=shapes.SCALES, default=DEVICE, help="which shapes (default: as the device)")
    group.addoption("--figures", type=Path, default=RESULTS, help="the ledger to append to")
    group.addoption("--budget", type=float, help="seconds after which no further benchmark is begun")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        found = SHAPES[metafunc.function.__name__](metafunc.config.getoption("scale"))
        metafunc.parametrize("shape", found, ids=["-".join(map(str, shape)).replace(" ", "") for shape in found])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first shape of every benchmark before the second of any: a budget cuts what tells least."""
    items.sort(key=lambda item: item.callspec.indices.get("shape", 0) if isinstance(item, WithShape) else 0)


@runtime_checkable
class WithShape(Protocol):
    callspec: Any


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
