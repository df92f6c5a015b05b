"""mbarriers in shared memory, whose phases end as threads have arrived and bytes have been copied."""

from __future__ import annotations

import numpy as np

from .errors import Fault, Unsupported
from .values import Array

COLUMNS = 64  # mbarriers of a CTA, at most


class Barriers:
    """Of several CTAs. A barrier is a column; its phases are counted from 1 on, also where it is made anew.

    Attributes:
        phase: the present one, of each CTA and column.
        seen: of each CTA, warp and column, the last phase that the warp knows to have ended.
    """

    def __init__(self, ctas: int, warps: int) -> None:
        shape = ctas, COLUMNS
        self.columns: dict[int, int] = {}
        self.expected, self.pending = np.zeros(shape, np.int32), np.zeros(shape, np.int32)  # 0 where there is none
        self.bytes = np.zeros(shape, np.int64)
        self.phase, self.first = np.ones(shape, np.int32), np.ones(shape, np.int32)
        self.seen = np.zeros((ctas, warps, COLUMNS), np.int32)

    def _columns(self, addresses: Array, ctas: Array, made: bool = True) -> Array:
        for address in np.unique(addresses).tolist():
            if len(self.columns) == COLUMNS and address not in self.columns:
                raise Unsupported(f"more than {COLUMNS} mbarriers")
            self.columns.setdefault(address, len(self.columns))
        found = np.array([self.columns[address] for address in addresses.tolist()], np.int64)
        if made and not self.expected[ctas, found].all():
            wrong = addresses[self.expected[ctas, found] == 0][0]
            raise Fault(f"there is no mbarrier at {wrong} of shared memory")
        return found

    def init(self, addresses: Array, ctas: Array, counts: Array) -> None:
        at = ctas, self._columns(addresses, ctas, made=False)
        if (counts < 1).any():
            raise Fault(f"an mbarrier for {counts.min()} arrivals")
        if self.expected[at].any():
            raise Fault("an mbarrier is made where there is one")
        self.expected[at] = self.pending[at] = counts
        self.bytes[at] = 0
        self.first[at] = self.phase[at]

    def invalidate(self, addresses: Array, ctas: Array) -> None:
        self.expected[ctas, self._columns(addresses, ctas)] = 0

    def arrive(self, addresses: Array, ctas: Array, counts: Array, expected: Array) -> None:
        """`counts` arrivals, in phases that wait for `expected` bytes more."""
        at = ctas, self._columns(addresses, ctas)
        np.add.at(self.bytes, at, expected)
        np.subtract.at(self.pending, at, counts)
        if (self.pending[at] < 0).any():
            raise Fault("more arrivals at an mbarrier than it was made for")
        self._complete(at)

    def copied(self, addresses: Array, ctas: Array, count: int) -> Array:
        """That each of some copies has brought so many bytes; what a place notes of it, see `in_flight`."""
        at = ctas, self._columns(addresses, ctas)
        tickets = self.phase[at] * COLUMNS + at[1]
        np.subtract.at(self.bytes, at, count)
        self._complete(at)
        return tickets.astype(np.int32)

    def _complete(self, at: tuple[Array, Array]) -> None:
        done = (self.pending[at] == 0) & (self.bytes[at] == 0)
        at = at[0][done], at[1][done]
        self.phase[at] += 1  # once, though a barrier be there several times
        self.pending[at] = self.expected[at]

    def test(self, addresses: Array, ctas: Array, warps: Array, parity: Array) -> Array:
        """Whether the phase of this parity has ended, which is the one before the present one."""
        columns = self._columns(addresses, ctas)
        now = self.phase[ctas, columns]
        ended = (now - self.first[ctas, columns]) % 2 != parity
        self.seen[ctas[ended], warps[ended], columns[ended]] = now[ended] - 1
        return np.asarray(ended)

    def barrier(self, ctas: Array) -> None:
        """What a warp knows, all warps of its CTA know from now on."""
        self.seen[ctas] = self.seen[ctas].max(1, keepdims=True)

    def in_flight(self, tickets: Array, ctas: Array, warps: Array | slice) -> Array:
        """Whether copies `[n, width]` may not have landed yet, as the warps of CTAs `[n]`, or all of some, know."""
        if isinstance(warps, slice):
            known = self.seen[:, warps].min(1)
            return np.asarray(tickets // COLUMNS > known[ctas[:, None], tickets % COLUMNS])
        return np.asarray(tickets // COLUMNS > self.seen[ctas[:, None], warps[:, None], tickets % COLUMNS])
