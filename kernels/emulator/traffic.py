"""What stands in the place of watching for races where accesses are counted."""

from __future__ import annotations

from typing import Any

import numpy as np

from .races import PLACE, SharedAccesses
from .values import Array

SECTOR = 32  # bytes, the least that is moved from or to DRAM


class Traffic:
    """Of a tensor in global memory.

    Attributes:
        loaded: bytes that threads, or copies, asked for.
        stored: likewise.
        read: whether a sector was read.
        written: whether one was written.
    """

    def __init__(self, places: int) -> None:
        sectors = places * PLACE // SECTOR + 1
        self.loaded = self.stored = 0
        self.read, self.written = np.zeros(sectors, bool), np.zeros(sectors, bool)

    def note_read_of(self, index: Array, width: int, *_: Any) -> None:
        self.loaded += index.size * width * PLACE
        self.read[index * (width * PLACE) // SECTOR] = True

    def note_write_of(self, index: Array, width: int, *_: Any) -> None:
        self.stored += index.size * width * PLACE
        self.written[index * (width * PLACE) // SECTOR] = True


class Unwatched(SharedAccesses):
    """Shared memory of which nothing is noted but what the run itself needs: mbarriers and groups."""

    def note_read(self, *_: Any, **__: Any) -> None: ...

    def note_write(self, *_: Any, **__: Any) -> None: ...

    def note_access(self, *_: Any, **__: Any) -> None: ...

    def note_copy(self, *_: Any, **__: Any) -> None: ...

    def note_product(self, *_: Any, **__: Any) -> None: ...

    def note_load(self, *_: Any, **__: Any) -> None: ...

    def note_store(self, *_: Any, **__: Any) -> None: ...
