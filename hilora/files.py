"""Files that are whole or not there, and files of one JSON object a line: the one way in which this library writes."""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hilora.errors import FileError, InvalidValueError

PathLike = str | os.PathLike[str]
Record = dict[str, Any]
TEMPORARY = ".tmp"


@contextmanager
def atomic(path: PathLike) -> Iterator[Path]:
    """A temporary neighbour of a file, to be written inside of the block, which then takes the file's place.

    What was written is on the disk before the name is. The permissions are those of the file that was there or, of a
    new one, what the umask leaves. After an error nothing is left behind, and what was there is as it was.

    Args:
        path: the file; folders above it are made.

    Yields:
        The path to write to. An empty file is there already.

    Raises:
        InvalidValueError: there can be no file at the path, since a folder or a device is there, or a file above it.
        OSError: it cannot be written; the error names the file.
    """
    target = Path(path)
    _check_place(os.fspath(path), target)
    made = [folder for folder in target.parents if not folder.exists()]  # the innermost first
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        temporary.touch(0o666, exist_ok=False)
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        _sync(temporary)
        temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, target)
        _sync(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def _check_place(path: str, target: Path) -> None:
    if target.is_dir() or path.endswith(("/", os.sep)):
        raise InvalidValueError(f"{path} is a folder, expected a file: add the name of a file in it")
    if target.exists() and not target.is_file():
        raise InvalidValueError(
            f"{path} is a device, a pipe or a socket, which a file would replace: give another path"
        )
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    if not folder.is_dir():
        raise InvalidValueError(f"{path} cannot be a file: {folder}, which it would be in, is no folder")


def clear_leftovers(folder: Path) -> None:
    """Take away what processes that were killed while they wrote have left in a folder; none may be writing there."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: PathLike, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; parts of paths that are no text stand as escapes, `\\udce9`."""
    write_bytes(path, _encoded(text))


def write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. Tensors and arrays become lists, NaN and infinities null."""
    write_text(path, _dumps(value, indent=2) + "\n")


def read_json(path: PathLike) -> Any:
    """What a file of JSON holds.

    Raises:
        FileError: it is none, or nested beyond use.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileError(f"{os.fspath(path)} is not JSON: {error}") from error


class Line(NamedTuple):
    """A line of a file of JSON lines.

    Attributes:
        text: its bytes, with the line break if it ends in one.
        record: the object that it holds; None where it holds none, as where a write was cut off.
    """

    text: bytes
    record: Record | None


def read_lines(path: PathLike) -> list[Line]:
    """The lines of a file of JSON lines; none where there is no such file."""
    if not Path(path).exists():
        return []
    return [Line(text, _record(text)) for text in Path(path).read_bytes().splitlines(keepends=True)]


def append_line(path: PathLike, record: Mapping[str, Any]) -> None:
    """Append a JSON object as one line, in one piece, after whatever other processes have appended; folders are made.

    A last line that was cut off is ended first: it stays, and does not swallow this one. Tensors and arrays become
    lists, NaN and infinities null.

    Raises:
        OSError: it could not be written.
    """
    text = _encoded(_dumps(record)) + b"\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = b"\n" + text
        if file.write(text) != len(text):
            raise OSError(f"{path} took only a part of a line: is the disk full?")
        os.fsync(file.fileno())


def set_aside(folder: Path, patterns: Iterable[str]) -> None:
    """Move the files of a folder that patterns fit into `earlier-1`, `earlier-2`, … inside of it."""
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if found:
        number = next(n for n in itertools.count(1) if not (folder / f"earlier-{n}").exists())
        (folder / f"earlier-{number}").mkdir()
        for path in found:
            path.rename(folder / f"earlier-{number}" / path.name)


def plain(value: Any) -> Any:
    """`value` with what JSON knows in the place of tensors, arrays, tuples, paths and numbers that are not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _record(text: bytes) -> Record | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no text, or nested beyond use
        return None
    return value if isinstance(value, dict) else None


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
