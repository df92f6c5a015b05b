"""Every operation of the registry at every shape: `pytest benchmarks/ --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.contest import contest
from benchmarks.ledger import Ledger
from benchmarks.operations import operations


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The first shape of every operation before the second of any: a budget cuts what tells least."""
    scale = metafunc.config.getoption("scale")
    cases = [
        (index, (name, phase, shape))
        for name, operation in operations().items()
        for phase in operation.phases
        for index, shape in enumerate(operation.shapes(scale))
    ]
    cases.sort(key=lambda case: case[0])
    values = [case for _, case in cases]
    ids = ["-".join(map(str, (name, phase, *shape))).replace(" ", "") for name, phase, shape in values]
    metafunc.parametrize(("operation", "phase", "shape"), values, ids=ids)


def test_operation(benchmark: Any, ledger: Ledger, operation: str, phase: str, shape: Any) -> None:
    lineup = operations()[operation].lineup(shape, phase, ledger.scale)
    try:
        contest(benchmark, ledger, {"op": operation, "phase": phase, **shape._asdict()}, lineup)
    finally:
        lineup.close()
