"""Federated methods, one file each."""

from __future__ import annotations

from hilora.discovery import enter, find_classes
from hilora.errors import InvalidValueError
from hilora.federated.strategies.base import Strategy

__all__ = ["STRATEGIES", "Strategy", "register", "resolve"]

STRATEGIES: dict[str, type[Strategy]] = find_classes(__name__, __path__, Strategy)  # type: ignore[type-abstract]
"""The methods that there are, by name."""


def register(kind: type[Strategy]) -> type[Strategy]:
    """Make a method that lives elsewhere known by its name, to files and the command line too; returns it.

    Raises:
        InvalidTypeError, InvalidValueError: it is no strategy, or its name is another's.
    """
    enter(STRATEGIES, kind, Strategy)  # type: ignore[type-abstract]
    return kind


def resolve(strategy: str | type[Strategy] | Strategy) -> Strategy:
    """A strategy from its name, its class, or itself.

    Raises:
        InvalidValueError: if there is no such name.
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise InvalidValueError(f"unknown strategy {strategy!r}: there are {', '.join(STRATEGIES)}")
        strategy = STRATEGIES[strategy]
    return strategy() if isinstance(strategy, type) else strategy
