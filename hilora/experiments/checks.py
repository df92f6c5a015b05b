"""What values of the TOML file must be: each check passes a value on, or says where it stands and what is expected."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, get_args

from pydantic.fields import FieldInfo

from hilora.errors import InvalidValueError

Table = Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTROL = ("Cc", "Zl", "Zp")  # what would break a line, or the terminal


class SpecError(InvalidValueError):
    """The file does not describe an experiment; says where and what is expected."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SpecError(otherwise)


def check_size(value: Any, place: str = "the file") -> None:
    """No whole number of more than the 64 bits that TOML allows it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            check_size(inner, name)
    elif isinstance(value, list):
        for inner in value:
            check_size(inner, place)
    elif isinstance(value, int):
        require(-(2**63) <= value < 2**63, f"{place} has {value!r:.40}…, expected a number of at most 64 bits")


def check_names(table: Any, known: Sequence[str], place: str, required: Sequence[str] = ()) -> None:
    """A table with none but known names in it, and all required ones."""
    require(isinstance(table, dict), f"{place} is {table!r}, expected a table")
    unknown, missing = [name for name in table if name not in known], [name for name in required if name not in table]
    require(not unknown, f"{place} has unknown {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}")
    require(not missing, f"{place} lacks {', '.join(missing)}")


def tables(content: Table, name: str) -> Table:
    """The named tables `[name.NAME]` of the file, at least one."""
    found: Table = content[name]
    require(bool(found), f"[{name}] is empty: expected at least one [{name}.NAME]")
    for key, table in found.items():
        require(bool(_NAME.fullmatch(key)), f"{name}: {key!r} is no name, expected letters, digits, '.', '_', '-'")
        require(isinstance(table, dict), f"{name}.{key} is {table!r}, expected a table [{name}.{key}]")
    return found


def text(value: Any, place: str) -> str:
    """Text of one line."""
    require(isinstance(value, str), f"{place} is {value!r}, expected text")
    control = [sign for sign in value if unicodedata.category(sign) in _CONTROL]
    require(not control, f"{place} is {value!r}, expected text without line breaks and control characters")
    return str(value)


def one_of(value: Any, known: Collection[str], place: str) -> str:
    """One of the names that there are."""
    found = text(value, place)
    require(found in known, f"{place} is {value!r}, expected one of {', '.join(known)}")
    return found


def inside(value: Any, place: str) -> str:
    """A path that leads nowhere else than into the data folder."""
    path = PurePosixPath(text(value, place))
    fits = not path.is_absolute() and ".." not in path.parts
    require(fits, f"{place} is {value!r}, expected a path inside of --data-dir: neither absolute nor with '..'")
    return str(value)


def seeds(values: Any, place: str) -> tuple[int, ...]:
    """Different seeds, at least one."""
    fits = isinstance(values, list) and values and all(type(seed) is int and seed >= 0 for seed in values)
    require(bool(fits) and len(set(values)) == len(values), f"{place}: {values!r}, expected different numbers ≥ 0")
    return tuple(values)


def numbers(table: Table, fields: Mapping[str, FieldInfo], place: str) -> Table:
    """Where a field asks for a number, an int or a float, which an int is good for: no text, no truth value."""
    for name, value in table.items():
        kind = get_args(fields[name].annotation) or (fields[name].annotation,)
        wanted = int in kind or float in kind
        fits = not wanted or type(value) in kind or (type(value) is int and float in kind)
        what = "a number" if float in kind else "a whole number"
        require(fits, f"{place}.{name} is {value!r}, expected {what}")
    return table
