"""The registry of benchmarks: each file in this folder is one, and says all of it in its `OPERATION`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from benchmarks.contest import Lineup


@dataclass(frozen=True)
class Charts:
    """How an operation is drawn, at the first of its shapes and along these.

    Attributes:
        colours: of the rivals, ours among them, in their order; others have no column in the tables either.
        limit: the rival that none can beat, by whose time the others are divided.
        curves: fields of the shape, each with the label of its axis.
        aside: fields of the shape at which nothing is measured, with a value to stand there.
        describe: a shape in words.
    """

    colours: Mapping[str, str]
    limit: str
    curves: Mapping[str, str]
    aside: Mapping[str, Any]
    describe: Callable[[Any], str]


def _fields(shape: Any) -> Mapping[str, object]:
    found: dict[str, object] = shape._asdict()
    return found


@dataclass(frozen=True)
class Operation:
    """Something to be timed. Its name, in the ledger too, is that of its file.

    Attributes:
        title: of its tables.
        shape: a NamedTuple, whose fields stand in the ledger.
        shapes: for a scale, the shapes that are measured, the most telling first: a budget of time cuts from the end.
        lineup: for a shape, a phase and a scale, the rivals, ours first, with the truth and their inputs.
        phases: what is timed, each with its title.
        columns: how a shape stands in the tables.
        charts: of one operation at most.
        place: where it stands in the report; those of one place by name.
        first: how many of its shapes are measured before all else, since they tell most.
    """

    title: str
    shape: type[Any]
    shapes: Callable[[str], Sequence[Any]]
    lineup: Callable[[Any, str, str], Lineup]
    phases: Mapping[str, str] = field(default_factory=lambda: {"step": ""})
    columns: Callable[[Any], Mapping[str, object]] = _fields
    charts: Charts | None = None
    place: int = 100
    first: int = 0


@cache
def operations() -> dict[str, Operation]:
    """All operations by name, in the order of the report, but for those that lack a package."""
    found = {name: one for name, one in _load().items() if isinstance(one, Operation)}
    return dict(sorted(found.items(), key=lambda item: (item[1].place, item[0])))


def left_out() -> dict[str, str]:
    """The other operations, each with the package that it lacks."""
    return {name: one for name, one in _load().items() if isinstance(one, str)}


def lacked(error: ModuleNotFoundError) -> str:
    """The package that an import lacked.

    Raises:
        ModuleNotFoundError: if it is one of this repository's.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "benchmarks", "hilora"):
        raise error
    return package


def _load() -> dict[str, Operation | str]:
    found: dict[str, Operation | str] = {}
    for name in (module.name for module in pkgutil.iter_modules(__path__)):
        try:
            found[name] = import_module(f"{__name__}.{name}").OPERATION
        except ModuleNotFoundError as error:
            found[name] = lacked(error)
    return found
