"""Finds the classes of a folder, so that a new file in it is all that a new one takes."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from inspect import isabstract
from typing import TypeVar

T = TypeVar("T")


def classes_in(package: str, kind: type[T]) -> Iterator[type[T]]:
    """The concrete subclasses of a class that are written in the modules of a package and say a `name` of their own, in
    the order of the modules' names."""
    for found in pkgutil.iter_modules(import_module(package).__path__):
        module = import_module(f"{package}.{found.name}")
        for one in vars(module).values():
            written_here = isinstance(one, type) and issubclass(one, kind) and one.__module__ == module.__name__
            if written_here and "name" in vars(one) and not isabstract(one):
                yield one
