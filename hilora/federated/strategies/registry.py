"""The methods that there are: those of this folder, and those that were registered."""

from __future__ import annotations

from hilora.errors import InvalidValueError
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
