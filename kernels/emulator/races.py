"""Who touched which place since the last barrier.

A stamp is `interval * 64 + warp`: intervals, from one barrier of a CTA to the next, are counted over all CTAs of a
launch, so that equal ones mean the same CTA without a barrier between. Two stamps of one interval and different warps
differ in their last six bits alone: `(a ^ b) - 1 < 63` in unsigned numbers. A place has two bytes.
"""

from __future__ import annotations

import numpy as np

from .groups import Groups
from .transfers import WARPS, Report, Transfers
from .values import Array

PLACE = 2  # bytes
WARPS_OF_GROUP = 4  # that take products by wgmma together
_LAST = np.uint32(WARPS - 1)  # of a stamp's warps; it stands for several


def without_barrier(one: Array, other: Array) -> Array:
    """Whether stamps are of different warps and the same interval."""
    return (one ^ other) - np.uint32(1) < _LAST


def _warps(stamps: Array) -> Array:
    return (stamps & _LAST).astype(np.int64)


class Accesses:
    """Stamps of the last write to each place, and of the last reads.

    Every method takes the accesses of one instruction: `index [n]`, in units of `width` places, and `stamps [n]`.
    """

    def __init__(self, places: int) -> None:
        self.written = np.zeros(places, np.uint32)
        self.read = np.zeros(places, np.uint32)
        self.any_written = False

    def note_read(self, index: Array, width: int, stamps: Array, report: Report) -> None:
        mine = stamps[:, None]
        if self.any_written:
            report("read after write", without_barrier(self.written.reshape(-1, width)[index], mine))
        reads = self.read.reshape(-1, width)
        before = reads[index]
        own = np.where(without_barrier(before, mine), mine | _LAST, mine)
        reads[index] = own
        several = without_barrier(reads[index], own)  # another warp's, by the same instruction
        if several.any():
            rows = several.any(1)
            reads[index[rows]] |= _LAST

    def note_write(self, index: Array, width: int, stamps: Array, report: Report) -> None:
        mine = stamps[:, None]
        written = self.written.reshape(-1, width)
        if self.any_written:
            report("write after write", without_barrier(written[index], mine))
        report("write after read", without_barrier(self.read.reshape(-1, width)[index], mine))
        written[index] = mine
        self.any_written = True


class GlobalAccesses(Accesses):
    """The same, and which CTA of the launch it was (from 1 on): no barrier lies between CTAs."""

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self.writer = np.zeros(places, np.int32)
        self.reader = np.zeros(places, np.int32)

    def note_read_of(self, index: Array, width: int, stamps: Array, ctas: Array, report: Report) -> None:
        self.note_read(index, width, stamps, report)
        own = ctas[:, None]
        if self.any_written:
            writer = self.writer.reshape(-1, width)[index]
            report("CTAs: read after write", (writer != 0) & (writer != own))
        readers = self.reader.reshape(-1, width)
        before = readers[index]
        readers[index] = after = np.where((before == 0) | (before == own), own, -1)
        lost = readers[index] != after
        if lost.any():
            readers[index[lost.any(1)]] = -1

    def note_write_of(self, index: Array, width: int, stamps: Array, ctas: Array, report: Report) -> None:
        self.note_write(index, width, stamps, report)
        own = ctas[:, None]
        writers, reader = self.writer.reshape(-1, width), self.reader.reshape(-1, width)[index]
        before = writers[index]
        writers[index] = own
        report("CTAs: write after write", ((before != 0) & (before != own)) | (writers[index] != own))
        report("CTAs: write after read", (reader != 0) & (reader != own))


class SharedAccesses(Accesses):
    """The same for the shared memory of several CTAs, one after another, with copies and matrix products under way.

    Copies by `cp.async` belong to a CTA; products by wgmma, which read operands, to one of its warp groups; copies by
    TMA to a warp.

    Attributes:
        transfers: copies by TMA.
        copied: of each place, `group * 64 + warp` of the last copy to it.
        taken: of each warp group and place, the last group of products that reads it.
        unfenced: the number of fences its CTA had passed, from 1 on, as a warp last wrote a place; 0 for a copy.
    """

    def __init__(self, ctas: int, places: int, warps: int, warpgroups: int) -> None:
        super().__init__(ctas * places)
        self.transfers = Transfers(ctas, places, warps)
        self.copies, self.products = Groups(ctas), Groups(ctas * warpgroups)
        self.copied = np.zeros(ctas * places, np.int32)
        self.taken = np.zeros((warpgroups, ctas * places), np.int32)
        self.unfenced = np.zeros(ctas * places, np.int32)
        self.fences = np.ones(ctas, np.int32)
        self.warpgroups = warpgroups
        self.any_copied = self.any_taken = False

    def note_access(self, index: Array, width: int, stamps: Array, ctas: Array, write: bool, report: Report) -> None:
        """Of `ctas`, counted within this memory."""
        what = "write" if write else "read"
        self._under_copies(index, width, stamps, ctas, what, report)
        self.transfers.check(index, width, ctas, _warps(stamps), write, what, report)
        if write:
            self._under_products(index, width, stamps, ctas, "write", report)
            self.note_write(index, width, stamps, report)
            self.unfenced.reshape(-1, width)[index] = self.fences[ctas][:, None]
        else:
            self.note_read(index, width, stamps, report)

    def note_copy(self, index: Array, width: int, stamps: Array, ctas: Array, report: Report) -> None:
        mine = stamps[:, None]
        self._under_copies(index, width, stamps, ctas, "cp.async", report)
        self._under_products(index, width, stamps, ctas, "cp.async", report)
        self.transfers.check(index, width, ctas, _warps(stamps), True, "cp.async", report)
        report("cp.async after write", without_barrier(self.written.reshape(-1, width)[index], mine))
        report("cp.async after read", without_barrier(self.read.reshape(-1, width)[index], mine))
        self.any_copied = True
        group = (self.copies.committed[ctas] + 1) * WARPS + (stamps & _LAST).astype(np.int32)
        self.copied.reshape(-1, width)[index] = group[:, None]
        self.unfenced.reshape(-1, width)[index] = 0

    def note_product(self, index: Array, width: int, stamps: Array, ctas: Array, group: int, report: Report) -> None:
        """Operands of a wgmma of warp group `group` of each CTA: every warp's writes need a barrier before."""
        copied = self.copied.reshape(-1, width)[index]
        report("wgmma on a cp.async in flight", copied >= (self.copies.done[ctas] + 1)[:, None] * WARPS)
        report("wgmma on a cp.async without a barrier", copied >= (self.copies.known[ctas] + 1)[:, None] * WARPS)
        report("wgmma after write", (self.written.reshape(-1, width)[index] ^ stamps[:, None]) < WARPS)
        self._fenced(index, width, ctas, "wgmma on", report)
        warps = slice(WARPS_OF_GROUP * group, WARPS_OF_GROUP * (group + 1))
        self.transfers.check(index, width, ctas, warps, False, "wgmma", report)
        number = self.products.committed[ctas * self.warpgroups + group] + 1
        self.taken[group].reshape(-1, width)[index] = number[:, None]
        self.any_taken = True

    def note_load(self, index: Array, width: int, stamps: Array, ctas: Array, tickets: Array, report: Report) -> None:
        """What a load by TMA writes."""
        mine, what = stamps[:, None], "TMA load"
        self._under_copies(index, width, stamps, ctas, what, report)
        self._under_products(index, width, stamps, ctas, what, report)
        self.transfers.check(index, width, ctas, _warps(stamps), True, what, report)
        report(f"{what} after write", without_barrier(self.written.reshape(-1, width)[index], mine))
        report(f"{what} after read", without_barrier(self.read.reshape(-1, width)[index], mine))
        self._fenced(index, width, ctas, f"{what} over", report)
        self.unfenced.reshape(-1, width)[index] = 0
        self.transfers.note_load(index, width, tickets)

    def note_store(self, index: Array, width: int, stamps: Array, ctas: Array, report: Report) -> None:
        """What a store by TMA reads."""
        what = "TMA store"
        self._under_copies(index, width, stamps, ctas, what, report)
        self.transfers.check(index, width, ctas, _warps(stamps), False, what, report)
        report(f"{what} after write", without_barrier(self.written.reshape(-1, width)[index], stamps[:, None]))
        self._fenced(index, width, ctas, f"{what} of", report)
        self.transfers.note_store(index, width, ctas, _warps(stamps))

    def _fenced(self, index: Array, width: int, ctas: Array, what: str, report: Report) -> None:
        fenced = self.unfenced.reshape(-1, width)[index]
        wrong = (fenced != 0) & (fenced == self.fences[ctas][:, None])
        report(f"{what} a write without fence.proxy.async", wrong)

    def barrier(self, ctas: Array, warpgroups: Array) -> None:
        self.copies.barrier(ctas)
        self.products.barrier(warpgroups)
        self.transfers.barrier(ctas)

    def _under_copies(self, index: Array, width: int, stamps: Array, ctas: Array, what: str, report: Report) -> None:
        if not self.any_copied:
            return
        copied = self.copied.reshape(-1, width)[index]
        suspect = copied >= (self.copies.known[ctas] + 1)[:, None] * WARPS
        if suspect.any():
            in_flight = copied >= (self.copies.done[ctas] + 1)[:, None] * WARPS
            report(f"{what} of a cp.async in flight", in_flight)
            others = (copied & int(_LAST)) != (stamps & _LAST)[:, None]
            report(f"{what} after cp.async", suspect & ~in_flight & others)

    def _under_products(self, index: Array, width: int, stamps: Array, ctas: Array, what: str, report: Report) -> None:
        if not self.any_taken:
            return
        for group in range(self.warpgroups):
            agents = ctas * self.warpgroups + group
            taken = self.taken[group].reshape(-1, width)[index]
            in_flight = taken > self.products.done[agents][:, None]
            report(f"{what} under a wgmma in flight", in_flight)
            report(f"{what} after wgmma", (taken > self.products.known[agents][:, None]) & ~in_flight)
