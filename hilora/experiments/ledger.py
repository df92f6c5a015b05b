"""The ledger of finished runs: one line of JSON each, appended, never changed."""

from __future__ import annotations

from pathlib import Path

from hilora.experiments.identity import fingerprint
from hilora.experiments.records import Line, is_record
from hilora.files import append_line, read_lines


class Ledger:
    """The lines of a file, found by what decided their results.

    Several processes may append to one file; `read` sees what the others have appended.

    Args:
        path: the file; it need not exist.

    Attributes:
        lines: all records, the oldest first.
        torn: numbers of the lines that are no records, as where a write was cut off; they are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self.torn: list[int] = []
        self._found: dict[str, Line] = {}
        self._size = 0
        self.read()

    def __len__(self) -> int:
        """How many different runs there are."""
        return len(self._found)

    def find(self, identity: str) -> Line | None:
        """The newest line with this fingerprint."""
        return self._found.get(identity)

    def read(self) -> None:
        """Take in what the file has now, if it has grown since it was last read."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._size:
            return
        self.lines, self.torn, self._found, self._size = [], [], {}, size
        for number, (_, line) in enumerate(read_lines(self.path), start=1):
            try:
                known = fingerprint(line["decides"]) if line is not None and is_record(line) else None
            except OverflowError:  # numbers beyond use
                known = None
            if line is None or known is None:
                self.torn.append(number)
            else:
                self.lines.append(line)
                self._found[known] = line

    def append(self, line: Line) -> None:
        """Write a line in one piece, after whatever others have written meanwhile.

        Raises:
            OSError: it could not be written.
        """
        append_line(self.path, line)
        self.read()
