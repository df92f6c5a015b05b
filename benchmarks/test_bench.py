"""Every operation of the registry at every shape: `pytest benchmarks/ --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.contest import contest
from benchmarks.ledger import Ledger
from benchmarks.operations import lacked, operations

Case = tuple[str, str, Any]  # operation, phase, shape


def cases(scale: str) -> tuple[list[Case], list[Case]]:
    """What tells most, one operation after another, and the rest, where the first shape of every operation comes before
    the second of any: a budget cuts what tells least."""
    found: tuple[list[tuple[int, Case]], list[tuple[int, Case]]] = [], []
    for name, operation in operations().items():
        for index, shape in enumerate(operation.shapes(scale)):
            for phase in operation.phases:
                found[index >= operation.first].append((index, (name, phase, shape)))
    first, rest = found
    return [case for _, case in first], [case for _, case in sorted(rest, key=lambda case: case[0])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    first, rest = cases(metafunc.config.getoption("scale"))
    values = {"all": first + rest, "first": first, "rest": rest}[metafunc.config.getoption("cases")]
    ids = ["-".join(map(str, (name, phase, *shape))).replace(" ", "") for name, phase, shape in values]
    metafunc.parametrize(("operation", "phase", "shape"), values, ids=ids)


def test_operation(benchmark: Any, ledger: Ledger, operation: str, phase: str, shape: Any) -> None:
    try:
        lineup = operations()[operation].lineup(shape, phase, ledger.scale)
    except ModuleNotFoundError as error:
        pytest.skip(f"left out: {lacked(error)} is not installed")
    try:
        contest(benchmark, ledger, {"op": operation, "phase": phase, **shape._asdict()}, lineup)
    finally:
        lineup.close()
