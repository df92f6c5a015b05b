"""What a run measures: accuracies over clients, a line of JSON for every round, files that are never half-written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

Record = dict[str, Any]


def summarise(accuracies: Tensor) -> dict[str, float | None]:
    """Mean, tail and spread of personalised accuracy.

    Args:
        accuracies: `[n]`, one fraction of 1 for each client; NaN for a client without test images, which is left out.

    Returns:
        `mean` over the clients; `tail`, the mean of the worst tenth of them (rounded up, so at least one client);
        `std`, the population standard deviation over clients. All None where no client has test images.
    """
    values = accuracies.detach().double().flatten().cpu()
    values = values[~values.isnan()].sort().values
    if not len(values):
        return {"mean": None, "tail": None, "std": None}
    worst = -(-len(values) // 10)  # the ceiling in integers: 0.1 * 30 is above 3 in floats
    return {
        "mean": values.mean().item(),
        "tail": values[:worst].mean().item(),
        "std": values.std(correction=0).item(),
    }


class MetricsLog:
    """The records of a run in `metrics.jsonl`: one JSON object a line, one line a round, each flushed at once.

    Args:
        path: the file; its folder is created.
        keep: how many records of an earlier run to keep, counted from the first; what follows them is cut off. The last
            line may be torn by a crash: then it is dropped, too. 0 begins an empty file.

    Raises:
        ValueError: a line before the last one is not a record, so this is no file of ours.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._records, length = _read(self.path, keep)
        self._file = open(self.path, "ab")  # noqa: SIM115 -- open for as long as the log is
        self._file.truncate(length)

    @property
    def records(self) -> list[Record]:
        """All records so far, the kept ones included, as the file has them."""
        return list(self._records)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and flush it."""
        line = _dumps(record)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._records.append(json.loads(line))

    def close(self) -> None:
        """Close the file; the records stay readable."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all. Tensors and arrays become lists, NaN and infinities null."""
    write_bytes(path, _dumps(obj, indent=2).encode() + b"\n")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all: into a temporary neighbour first, which then takes the file's place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, keep: int) -> tuple[list[Record], int]:
    """The first `keep` records of a file and the bytes that they take."""
    records: list[Record] = []
    length = 0
    if not keep or not path.exists():
        return records, length
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines[:keep], start=1):
        record = _parse(line)
        if record is None:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {path} is no JSON object: not a metrics file; choose another folder")
        records.append(record)
        length += len(line)
    return records, length


def _parse(line: bytes) -> Record | None:
    """The record in a line; None where the line is torn."""
    try:
        record = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are both of this kind
        return None
    return record if isinstance(record, dict) and line.endswith(b"\n") else None


def _dumps(obj: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(obj), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(obj: Any) -> Any:
    """`obj` with what JSON knows in the place of tensors, arrays, paths and numbers that are not finite."""
    if hasattr(obj, "tolist"):
        obj = obj.tolist()
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    return os.fspath(obj) if isinstance(obj, os.PathLike) else obj
