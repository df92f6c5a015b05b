"""From the fields of settings to arguments of a command line, and back."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hilora.errors import HiLoRAError, InvalidValueError
from hilora.federated.settings import TIERS

S = TypeVar("S")


def flag(name: str) -> str:
    """What a field is called on the command line."""
    return f"--{name.replace('_', '-')}"


def add_field(group: argparse._ArgumentGroup, name: str, field: FieldInfo, help: str) -> None:
    """Add the argument of a field. It is in the namespace only where it was given, or the parser has a default."""
    group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=help, **_kind(field.annotation))


def described(field: FieldInfo, *defaults: Any) -> str:
    """What a field is, with its default; or with others, where there are several or the command has its own."""
    shown = dict.fromkeys(map(_shown, defaults or (field.get_default(),)))
    return f"{field.description} ({' or '.join(shown)})"


def made(kind: Callable[..., S], values: Mapping[str, Any]) -> S:
    """Settings from values by name.

    Raises:
        InvalidValueError: as they do, with the names of the flags in place of those of the fields.
    """
    try:
        return kind(**values)
    except InvalidValueError as error:
        named = re.compile(rf"\b({'|'.join(map(re.escape, values))})(\.\w+)?(?==| is )")
        said = named.sub(lambda m: f"{flag(m[1])}{m[2] or ''}", str(error)) if values else str(error)
        raise InvalidValueError(said) from None


@contextmanager
def about(**given: Any) -> Iterator[None]:
    """Name the flags, and what was given by them, in what goes wrong because of that."""
    try:
        yield
    except (HiLoRAError, OSError) as error:
        flags = " ".join(f"{flag(name)} {value}" for name, value in given.items() if value is not None)
        raise InvalidValueError(f"{flags}: {error}") from error


def _kind(annotation: Any) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    annotation = _bare(annotation)
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"choices": inside}
    if origin is dict:
        number = _bare(inside[1])
        return {"type": _per_tier(number), "metavar": f"{number.__name__.upper()}[,…]"}
    if origin is tuple:
        return {"nargs": "+", "type": _bare(inside[0]), "metavar": "NAME"}
    return {"type": annotation, "metavar": annotation.__name__.upper()}


def _bare(annotation: Any) -> Any:
    """A type without what else is said of it, and without None."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, UnionType):
            (annotation,) = (one for one in get_args(annotation) if one is not NoneType)
        else:
            return annotation


def _per_tier(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads one value, or one for each tier: `8` or `16,8,4`."""

    def read(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if len(values) not in (1, len(TIERS)):
            raise argparse.ArgumentTypeError(
                f"one value, or one for each of {', '.join(TIERS)}: {text!r} has {len(values)}"
            )
        return values

    read.__name__ = f"{kind.__name__}[,{kind.__name__},{kind.__name__}]"
    return read


def _shown(value: Any) -> str:
    """A default in a few signs."""
    if value is PydanticUndefined:
        return "must be given"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list | tuple):
        return (" " if all(isinstance(one, str) for one in value) else ",").join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
