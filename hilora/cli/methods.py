"""The settings of methods on the command line: of each by itself, or of all that have one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from pydantic.fields import FieldInfo

from hilora.cli.fields import add_field, described, flag, made
from hilora.errors import InvalidTypeError, InvalidValueError
from hilora.federated.data.partitions import settings
from hilora.federated.settings import TIERS, TrainingSettings
from hilora.federated.strategies import STRATEGIES, Strategy, own_fields, register

TAKEN = frozenset(settings())
"""Names that arguments of the data have: a method's field that is called so has the longer form alone."""
ABOUT = "a method's own; --METHOD.FIELD VALUE is for one method alone, such as --{example}"


def load(text: str) -> type[Strategy]:
    """The class of a strategy, by its name or as `package.module:Class`.

    Raises:
        InvalidValueError: if there is no such one.
        InvalidTypeError: if the class is no strategy.
    """
    module, colon, name = text.partition(":")
    if not colon:
        if text not in STRATEGIES:
            raise InvalidValueError(f"--strategy {text}: there are {', '.join(STRATEGIES)}, or package.module:Class")
        return STRATEGIES[text]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as python -m looks there
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidValueError(f"--strategy {text} cannot be loaded: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise InvalidTypeError(f"--strategy {text} is no strategy: derive it from {Strategy.__module__}.Strategy")
    return register(kind)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Arguments for the settings of all methods that are known."""
    by_field: dict[str, dict[str, FieldInfo]] = {}
    for method, kind in STRATEGIES.items():
        for name, field in own_fields(kind).items():
            by_field.setdefault(name, {})[method] = field
    name, of_methods = next(iter(by_field.items()))
    example = f"{next(iter(of_methods))}.{flag(name).removeprefix('--')}"
    group = parser.add_argument_group("settings of methods", ABOUT.format(example=example))
    for name, of_methods in by_field.items():
        if name not in TAKEN:
            add_field(group, name, next(iter(of_methods.values())), _told(of_methods))
        for method, field in of_methods.items():
            hidden = _told({method: field}) if name in TAKEN else argparse.SUPPRESS
            add_field(group, f"{method}.{name}", field, hidden)
    for stem, names in _stems().items():
        words = f"{' and '.join(map(flag, names))} together"
        add_field(group, stem, next(iter(by_field[names[0]].values())), words)


def _told(of_methods: Mapping[str, FieldInfo]) -> str:
    """What a field is, with the methods that have it."""
    said: dict[str, list[str]] = {}
    for method, field in of_methods.items():
        said.setdefault(described(field), []).append(method)
    return "; ".join(f"{', '.join(methods)}: {words}" for words, methods in said.items())


def chosen(args: argparse.Namespace, kinds: Sequence[type[Strategy]]) -> list[Strategy]:
    """The strategies with the settings that were given.

    Raises:
        InvalidValueError: for a setting that none of them has, or a value that does not fit.
    """
    given, left, together = vars(args), set(_owned(args)), _stems()
    strategies = []
    for kind in kinds:
        name = kind.name or kind.__name__
        values = {}
        for field in own_fields(kind):
            wider = [stem for stem, names in together.items() if field in names]
            for key in (*wider, field, f"{name}.{field}"):  # what is for fewer counts more
                if key in given and key not in TAKEN:
                    values[field] = given[key]
                    left.discard(key)
        strategies.append(made(kind, values))
    for key in sorted(left):
        meant = set(together.get(key, [key.rpartition(".")[2]]))
        having = [name for name, kind in STRATEGIES.items() if meant & set(own_fields(kind))]
        having = [key.partition(".")[0]] if "." in key else having
        raise InvalidValueError(f"{flag(key)} is for {', '.join(having)}: none of these is in --strategy")
    return strategies


def _owned(args: argparse.Namespace) -> list[str]:
    """What was given of methods' settings."""
    names = {name for kind in STRATEGIES.values() for name in own_fields(kind)} | set(_stems())
    return [key for key in vars(args) if key.rpartition(".")[2] in names and key not in TAKEN]


def _stems() -> dict[str, list[str]]:
    """Settings of methods that are named after tiers, `x_root` and `x_cluster`, by what they have in common, `x`: one
    argument sets them together. Where something else has that name, there is none."""
    names = {name: None for kind in STRATEGIES.values() for name in own_fields(kind)}
    others = {*names, *TAKEN, *TrainingSettings.model_fields}
    found: dict[str, list[str]] = {}
    for name in names:
        stem, _, tier = name.rpartition("_")
        if stem and tier in TIERS and stem not in others:
            found.setdefault(stem, []).append(name)
    return {stem: several for stem, several in found.items() if len(several) > 1}
