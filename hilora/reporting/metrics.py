"""The rounds of a run in `metrics.jsonl`, one line a round."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hilora.errors import FileError
from hilora.files import PathLike, Record, append_line, plain, read_lines, write_bytes

log = logging.getLogger(__name__)


class MetricsLog:
    """The records of a run: one JSON object a line, one line a round, each on the disk once it is appended.

    Args:
        path: the file; its folder is created.
        keep: how many records of an earlier run to keep, counted from the first; what follows them is cut off. The last
            line may be torn by a crash: then it is dropped, too. 0 begins an empty file; where there are fewer, a
            warning says so.

    Raises:
        FileError: a line before the last one is not a record, so this is no file of ours.
    """

    def __init__(self, path: PathLike, keep: int = 0) -> None:
        self.path = Path(path)
        lines = read_lines(path) if keep else []
        if lines and (lines[-1].record is None or not lines[-1].text.endswith(b"\n")):
            del lines[-1]
        self._records: list[Record] = []
        for number, line in enumerate(lines[:keep], start=1):
            if line.record is None:
                raise FileError(f"line {number} of {path} is no JSON object: not a metrics file; choose another folder")
            self._records.append(line.record)
        if len(self._records) < keep:
            log.warning(
                "%s has %d of %d rounds: the others are missing from it, and from what is drawn", path, len(lines), keep
            )
        write_bytes(path, b"".join(line.text for line in lines[:keep]))

    @property
    def records(self) -> list[Record]:
        """All records so far, the kept ones included, as the file has them."""
        return list(self._records)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        append_line(self.path, record)
        self._records.append(json.loads(json.dumps(plain(record))))
