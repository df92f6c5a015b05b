"""Federated methods, one file each."""

from hilora.discovery import classes_in
from hilora.federated.strategies.base import Strategy
from hilora.federated.strategies.registry import STRATEGIES, own_fields, register, resolve

for _kind in classes_in(__name__, Strategy):  # type: ignore[type-abstract]
    register(_kind)

__all__ = ["STRATEGIES", "Strategy", "own_fields", "register", "resolve"]
