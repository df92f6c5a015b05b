"""Federated methods, one file each."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from hilora.discovery import enter, find_classes
from hilora.errors import InvalidValueError
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies.base import Strategy

__all__ = ["STRATEGIES", "Strategy", "own_fields", "register", "resolve"]

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
        InvalidValueError: if there is no such name, or a setting of its own has the name of one that all share.
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise InvalidValueError(f"unknown strategy {strategy!r}: there are {', '.join(STRATEGIES)}")
        strategy = STRATEGIES[strategy]
    found = strategy() if isinstance(strategy, type) else strategy
    own_fields(type(found))
    return found


def own_fields(kind: type[Strategy]) -> dict[str, FieldInfo]:
    """The settings that a method has beside those that all share, by name.

    Raises:
        InvalidValueError: if it gives one a name of those that all share.
    """
    fields = kind.Settings.model_fields
    taken = sorted(set(fields) & set(TrainingSettings.model_fields))
    if taken:
        raise InvalidValueError(f"{kind.name}: {', '.join(taken)} is what all methods share: give it another name")
    return dict(fields)
