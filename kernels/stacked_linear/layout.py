"""How the tiers of a layer lie side by side in one low-rank product, for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from ..launch import power_of_two
from .tier import Tier


class Entry(NamedTuple):
    """Where a tier lies."""

    segment: int
    offset: int  # of its first rank in the segment
    filled: int  # ranks that it fills: its own, and zeros to the end of the segment if it is the last
    trained: bool


class Layout(NamedTuple):
    """Tiers on the same columns of the output form a segment; each segment has R ranks, of which the first are trained.

    Packed adapters are A `[G, ranks, in]` and B `[G, width, R]`, the rows of all segments one after another.
    """

    entries: tuple[Entry, ...]
    columns: tuple[tuple[int, int, int], ...]  # of each segment: start, width, and its first row in the packed B
    R: int
    trained: int  # ranks of a segment in training, at most
    ranks: int  # of all segments, filled to whole chunks
    chunk: int  # ranks a kernel takes at once

    @property
    def width(self) -> int:
        """Rows of the packed B."""
        return sum(width for _, width, _ in self.columns)

    @classmethod
    def of(cls, tiers: Sequence[Tier], trained: Sequence[bool], out: int, dtype: torch.dtype) -> Layout:
        """The layout of tiers that are not empty, given which of them are in training, and the dtype of x."""
        ranks = tuple(tier.A.shape[1] for tier in tiers)
        places = tuple(tier.columns or (0, out) for tier in tiers)
        find = _layout if all(type(rank) is int for rank in ranks) else _layout.__wrapped__  # torch.compile has symbols
        return find(ranks, places, tuple(trained), dtype)


@cache
def _layout(
    ranks_of: tuple[int, ...], places: tuple[tuple[int, int], ...], trained: tuple[bool, ...], dtype: torch.dtype
) -> Layout:
    segments: dict[tuple[int, int], list[int]] = {}
    for index in sorted(range(len(places)), key=lambda index: not trained[index]):
        segments.setdefault(places[index], []).append(index)
    totals = [sum(ranks_of[index] for index in members) for members in segments.values()]
    R = power_of_two(max(totals), at_least=16)
    chunk = min(power_of_two(len(segments) * R), 128 // dtype.itemsize)
    ranks = -(-len(segments) * R // chunk) * chunk
    entries: dict[int, Entry] = {}
    most_trained = 0
    for number, members in enumerate(segments.values()):
        end = R if number < len(segments) - 1 else ranks - number * R
        offset = 0
        for index in members:
            rank = ranks_of[index]
            filled = end - offset if index == members[-1] else rank
            entries[index] = Entry(number, offset, filled, trained[index])
            offset += rank
            if trained[index]:
                most_trained = max(most_trained, offset)
    columns, row = [], 0
    for start, width in segments:
        columns.append((start, width, row))
        row += width
    ordered = tuple(entries[index] for index in range(len(places)))
    return Layout(ordered, tuple(columns), R, most_trained, ranks, chunk)
