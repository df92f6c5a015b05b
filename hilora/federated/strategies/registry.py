"""The methods that there are: those of this folder, and those that were registered."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from hilora.errors import InvalidValueError
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies.base import Strategy

STRATEGIES: dict[str, type[Strategy]] = {}


def register(kind: type[Strategy]) -> type[Strategy]:
    """Make a method known by its name, also one that lives outside of the package; as a decorator, too.

    Raises:
        InvalidValueError: if another method has the name.
    """
    other = STRATEGIES.setdefault(kind.name, kind)
    if other is not kind:
        raise InvalidValueError(
            f"{kind.name!r} is the name of {other.__qualname__}: choose another for {kind.__qualname__}"
        )
    return kind


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
