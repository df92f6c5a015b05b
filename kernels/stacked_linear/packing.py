"""How the kernels of `slots` are launched: before the products, and after them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..launch import Constants, cdiv, int32, launch, power_of_two, precision
from .layout import Layout
from .slots import pack, sum_by_slot
from .tier import Tier

PARTS, ELEMENTS = 32, 128  # that a program of sum_by_slot adds at once


def packed(x: Tensor, tiers: Sequence[Tier], layout: Layout) -> tuple[Tensor, Tensor]:
    """A `[G, ranks, in]` and B `[G, width, R]` of the adapters that the groups use, in the dtype of x."""
    groups, _, width = x.shape
    A = x.new_empty(groups, layout.ranks, width)
    B = x.new_empty(groups, layout.width, layout.R)
    blocks, constants = _packing(layout, _static(tiers), width, precision(x.dtype))
    launch(
        pack, (groups, blocks, len(tiers)), tuple(tier.A.contiguous() for tier in tiers),
        tuple(tier.B.contiguous() for tier in tiers), *_tables(tiers, x), A, B, constants=constants,
    )  # fmt: skip
    return A, B


def summed_by_slot(dA: Tensor, dB: Tensor, tiers: Sequence[Tier], layout: Layout, blocks: int) -> list[Tensor]:
    """The gradients of the tiers in training, in the dtype of their factors.

    Args:
        dA: parts `[programs, segments, trained, in]`, of `blocks` programs for each group.
        dB: parts `[programs, width, trained]`.
    """
    trained = [tier for tier, entry in zip(tiers, layout.entries, strict=True) if entry.trained]
    if not trained:
        return []
    outs = [
        torch.empty_like(factor, memory_format=torch.contiguous_format)
        for tier in trained
        for factor in (tier.A, tier.B)
    ]
    # The scales are in the packed B, hence in dS and dA.
    both = [own for tier in trained for own in (tier._replace(scale=1.0, slot_scales=None), tier)]
    programs, width = len(dA), dA.shape[-1]
    grid, constants = _summing(layout, _static(both), width, max(power_of_two(programs), PARTS) if programs else 0)
    launch(
        sum_by_slot, (max(tier.A.shape[0] for tier in both), *grid), dA, dB, tuple(outs), *_tables(both, dA), programs,
        max(blocks, 1), constants=constants,
    )  # fmt: skip
    return outs


def _tables(tiers: Sequence[Tier], like: Tensor) -> tuple[Any, ...]:
    """Slots, ranks, scales and sizes of the tiers' tables, as the kernels take them."""
    return (
        tuple(int32(tier.slot, like) for tier in tiers),
        tuple(int32(tier.ranks, like) for tier in tiers),
        tuple(None if tier.slot_scales is None else tier.slot_scales.to(like.device).contiguous() for tier in tiers),
        tuple(tier.scale for tier in tiers),
        tuple(2 * tier.A.shape[0] + 1 for tier in tiers),
    )


def _static(tiers: Sequence[Tier]) -> tuple[tuple[bool, int], ...]:
    """Of each tier: whether group g uses adapter g, and its rank."""
    return tuple((tier.slot is None and tier.A.shape[0] > 1, tier.A.shape[1]) for tier in tiers)


@cache
def _packing(layout: Layout, tiers: tuple[tuple[bool, int], ...], width: int, how: str) -> tuple[int, Constants]:
    """Blocks of a table, and the constants."""
    places = [layout.columns[entry.segment] for entry in layout.entries]
    block = 64 if max(entry.filled for entry in layout.entries) < 64 else 16
    constants = Constants(
        IN=width, WIDTH=layout.width, RANKS=layout.ranks, R=layout.R, FOR_EACH=tuple(tier[0] for tier in tiers),
        TIER_RANKS=tuple(tier[1] for tier in tiers), SEGMENTS=tuple(entry.segment for entry in layout.entries),
        OFFSETS=tuple(entry.offset for entry in layout.entries),
        FILLED=tuple(entry.filled for entry in layout.entries),
        PADDED=tuple(power_of_two(entry.filled) for entry in layout.entries),
        WIDTHS=tuple(place[1] for place in places), FIRST=tuple(place[2] for place in places), PRECISION=how,
        BLOCK=block,
    )  # fmt: skip
    return cdiv(max(width, *(place[1] for place in places)), block), constants


@cache
def _summing(
    layout: Layout, both: tuple[tuple[bool, int], ...], width: int, rounded: int
) -> tuple[tuple[int, int], Constants]:
    """The grid but for the slots, and the constants."""
    runs = []
    for entry, (_, rank) in zip((entry for entry in layout.entries if entry.trained), both[::2], strict=True):
        _, columns, first = layout.columns[entry.segment]
        size = rank * width
        runs.append((size, size, size, (entry.segment * layout.trained + entry.offset) * width))
        runs.append((columns * rank, rank, layout.trained, first * layout.trained + entry.offset))
    sizes, lengths, strides, firsts = zip(*runs, strict=True)
    constants = Constants(
        A_SIZE=len(layout.columns) * layout.trained * width or 1, B_SIZE=layout.width * layout.trained,
        IS_A=tuple(index % 2 == 0 for index in range(len(both))), FOR_EACH=tuple(tier[0] for tier in both),
        TIER_RANKS=tuple(tier[1] for tier in both), SIZES=sizes, LENGTHS=lengths, STRIDES=strides, FIRST=firsts,
        ROUNDED=rounded, BP=PARTS, BE=ELEMENTS,
    )  # fmt: skip
    return (cdiv(max(sizes), ELEMENTS), len(both)), constants
