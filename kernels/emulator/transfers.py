"""Copies by TMA between global and shared memory: loads are awaited by mbarriers, stores by groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .groups import Groups
from .mbarriers import COLUMNS, Barriers
from .values import Array

WARPS = 64  # numbers of them
Report = Callable[[str, Any], None]  # of what, and where it is True


class Transfers:
    """Those under way, for each place of the shared memory of several CTAs.

    The lanes of a warp share their groups of stores: it does not matter which of them is elected.

    Attributes:
        barriers: that say when loads have landed.
        stores: groups of each warp, which has waited for what they read.
        loaded: of each place, the ticket of the last load to it; see `Barriers.copied`.
        leaving: of each place, `group * 64 + warp` of the last store that reads it.
    """

    def __init__(self, ctas: int, places: int, warps: int) -> None:
        self.barriers = Barriers(ctas, warps)
        self.stores = Groups(ctas * warps)
        self.warps = warps
        self.loaded = np.zeros(ctas * places, np.int32)
        self.leaving = np.zeros(ctas * places, np.int32)
        self.any_loaded = self.any_leaving = False

    def barrier(self, ctas: Array) -> None:
        self.barriers.barrier(ctas)
        self.stores.barrier((ctas[:, None] * self.warps + np.arange(self.warps)).ravel())

    def note_load(self, index: Array, width: int, tickets: Array) -> None:
        self.loaded.reshape(-1, width)[index] = tickets[:, None]
        self.any_loaded = True

    def note_store(self, index: Array, width: int, ctas: Array, warps: Array) -> None:
        group = self.stores.committed[ctas * self.warps + warps] + 1
        self.leaving.reshape(-1, width)[index] = (group * WARPS + warps)[:, None]
        self.any_leaving = True

    def check(
        self, index: Array, width: int, ctas: Array, warps: Array | slice, write: bool, what: str, report: Report
    ) -> None:  # fmt: skip
        """An access, whatever does it; a read by all of several warps."""
        if self.any_loaded:
            tickets = self.loaded.reshape(-1, width)[index]
            report(f"{what} of a TMA load in flight", self.barriers.in_flight(tickets, ctas, warps))
        if write and self.any_leaving and not isinstance(warps, slice):
            group = self.leaving.reshape(-1, width)[index]
            owner = group % WARPS
            agents = ctas[:, None] * self.warps + owner
            ended = np.where(owner == warps[:, None], self.stores.done[agents], self.stores.known[agents])
            report(f"{what} under a TMA store in flight", group // WARPS > ended)

    def check_end(self, report: Report) -> None:
        """That no copy goes on where its CTA has ended."""
        if self.any_loaded:
            seen = self.barriers.seen.max(1)
            tickets = self.loaded.reshape(len(seen), -1)
            ctas = np.arange(len(seen))[:, None]
            report("end under a TMA load in flight", tickets // COLUMNS > seen[ctas, tickets % COLUMNS])
        if self.any_leaving:
            group = self.leaving.reshape(len(self.barriers.seen), -1)
            ctas = np.arange(len(group))[:, None]
            done = self.stores.done[ctas * self.warps + group % WARPS]
            report("end under a TMA store in flight", group // WARPS > done)
