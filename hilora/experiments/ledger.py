"""The ledger of finished runs: one line of JSON each, appended; only `migrate` changes any, and no result."""

from __future__ import annotations

import json
from pathlib import Path

from hilora.experiments.identity import fingerprint
from hilora.experiments.records import Line, is_record
from hilora.experiments.schema import upgraded_line
from hilora.files import Record, append_line, read_lines, write_bytes


class Ledger:
    """The lines of a file, found by what decided their results.

    Several processes may append to one file; `read` sees what the others have appended.

    Args:
        path: the file; it need not exist.

    Attributes:
        lines: all records, the oldest first, in the newest schema.
        torn: numbers of the lines that are no records, as where a write was cut off; they are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self.torn: list[int] = []
        self._found: dict[str, Line] = {}
        self._runs: set[str] = set()
        self._size = 0
        self.read()

    def __len__(self) -> int:
        """How many different runs there are."""
        return len(self._runs)

    def find(self, identity: str) -> Line | None:
        """The newest line with this fingerprint; a run whose arithmetic is to be chosen is found whichever was."""
        return self._found.get(identity)

    def read(self) -> None:
        """Take in what the file has now, if it has grown since it was last read."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._size:
            return
        self.lines, self.torn, self._found, self._size = [], [], {}, size
        self._runs.clear()
        for number, (_, record) in enumerate(read_lines(self.path), start=1):
            line = _understood(record)
            if line is None:
                self.torn.append(number)
                continue
            self.lines.append(line)
            decides = line["decides"]
            self._runs.add(fingerprint(decides))
            self._found[fingerprint(decides)] = line
            self._found[fingerprint({**decides, "model": {**decides["model"], "dtype": "auto"}})] = line

    def append(self, line: Line) -> None:
        """Write a line in one piece, after whatever others have written meanwhile.

        Raises:
            OSError: it could not be written.
        """
        append_line(self.path, line)
        self.read()


def migrate(path: Path) -> int:
    """Rewrite the lines of a ledger in the newest schema; what is no record stays as it is.

    Returns:
        How many lines were in an older one.

    Raises:
        OSError: it cannot be read or written; then it is as it was.
    """
    texts, changed = [], 0
    for text, record in read_lines(path):
        line = _understood(record)
        old = line is not None and line != record
        texts.append((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode() if old else text)
        changed += old
    if changed:
        write_bytes(path, b"".join(texts))
    return changed


def _understood(record: Record | None) -> Line | None:
    """A record in the newest schema; None where it is none."""
    if record is None or not is_record(record):
        return None
    line = upgraded_line(record)
    try:
        fingerprint(line["decides"])
    except (OverflowError, RecursionError):  # numbers and depths beyond use
        return None
    return line
