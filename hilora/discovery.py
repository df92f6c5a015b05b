"""Finds the classes that a folder of modules brings, so that a new file there is all that a new one needs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

from hilora.errors import InvalidTypeError, InvalidValueError

T = TypeVar("T")


def find_classes(package: str, path: Iterable[str], base: type[T]) -> dict[str, type[T]]:
    """The classes of a package's modules that can be made, by their `name`; modules are imported in order of name.

    Args:
        package: its full name.
        path: its `__path__`.
        base: what the classes derive from; the abstract ones among them are passed over.
    """
    found: dict[str, type[T]] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        for kind in vars(importlib.import_module(f"{package}.{module}")).values():
            here = inspect.isclass(kind) and kind.__module__ == f"{package}.{module}"
            if here and issubclass(kind, base) and not inspect.isabstract(kind):
                enter(found, kind, base)
    return found


def enter(table: dict[str, type[T]], kind: type[T], base: type[T]) -> None:
    """Adds a class to those that are known by name.

    Raises:
        InvalidTypeError: it does not derive from `base`, or lacks a method that this asks for.
        InvalidValueError: it has no name of its own.
    """
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise InvalidTypeError(f"{kind!r} is not a class derived from {base.__name__}: derive it from that")
    if lacking := sorted(getattr(kind, "__abstractmethods__", ())):
        raise InvalidTypeError(f"{kind.__name__} lacks {', '.join(lacking)}, which a {base.__name__} has: write it")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name:
        raise InvalidValueError(f"{kind.__name__}.name is {name!r}, expected what it is called by: name = '...'")
    if table.setdefault(name, kind) is not kind:
        taken = f"{table[name].__module__}.{table[name].__qualname__}"
        raise InvalidValueError(f"{kind.__name__} is called {name!r}, as {taken} is: give it another name")
