"""From the adapters in a table to those that each group of rows uses, and from their gradients back, in Triton.

The number of adapters in a table is known at run time only, so that nothing is compiled anew where one grows. It comes
as `2 S + 1`: Triton compiles anew for 1 and for multiples of 16.
"""

import triton
import triton.language as tl

from .triton import cast


@triton.jit
def pack(
    As,
    Bs,
    slots,
    ranks,  # of each tier: those of its adapters [S], or None
    slot_scales,  # likewise, beside the tier's own scale
    scales,
    tables,
    A,  # [G, RANKS, IN]
    B,  # [G, WIDTH, R]
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    R: tl.constexpr,
    FOR_EACH: tl.constexpr,  # of each tier: whether group g uses adapter g, its rank, and its place (see layout.Entry)
    TIER_RANKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    OFFSETS: tl.constexpr,
    FILLED: tl.constexpr,
    PADDED: tl.constexpr,  # FILLED, to the next power of two
    WIDTHS: tl.constexpr,  # of each tier: rows of its B, and the first one of them in the packed B
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adapters that each group uses, side by side, in the dtype of x; B times its scales.

    Zeros where a group uses none and beyond the rank of its slot, NaN where its slot is outside of the table: to tell,
    the device would have to be waited for.
    """
    group = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for t in tl.static_range(len(As)):
        if tl.program_id(2) == t:
            if slots[t] is not None:
                slot = tl.load(slots[t] + group).to(tl.int64)
            elif FOR_EACH[t]:
                slot = group
            else:
                slot = group * 0
            there = slot < tables[t] // 2
            present = (slot >= 0) & there
            if ranks[t] is not None:
                rank = tl.minimum(tl.load(ranks[t] + slot, present, other=0), TIER_RANKS[t])
            else:
                rank = tl.where(present, TIER_RANKS[t], 0)
            i = tl.arange(0, PADDED[t])
            wanted = (i < rank)[:, None] & (block < IN)[None, :]
            a = tl.load(As[t] + (slot * TIER_RANKS[t] + i[:, None]) * IN + block[None, :], wanted, other=0.0)
            a = tl.where(there, a.to(tl.float32), float("nan"))
            row = group * RANKS + SEGMENTS[t] * R + OFFSETS[t] + i
            tl.store(
                A + row[:, None] * IN + block[None, :],
                cast(a, A.dtype.element_ty, PRECISION),
                (i < FILLED[t])[:, None] & (block < IN)[None, :],
            )
            wanted = (block < WIDTHS[t])[:, None] & (i < rank)[None, :]
            source = (slot * WIDTHS[t] + block[:, None]) * TIER_RANKS[t] + i[None, :]
            b = tl.load(Bs[t] + source, wanted, other=0.0).to(tl.float32) * scales[t]
            if slot_scales[t] is not None:
                b *= tl.load(slot_scales[t] + slot, present, other=0.0)
            b = tl.where(there, b, float("nan"))
            column = OFFSETS[t] + i
            tl.store(
                B + (group * WIDTH + FIRST[t] + block[:, None]) * R + column[None, :],
                cast(b, B.dtype.element_ty, PRECISION),
                (block < WIDTHS[t])[:, None] & ((i < FILLED[t]) & (column < R))[None, :],
            )


@triton.jit
def sum_by_slot(
    dA,  # [programs, A_SIZE] fp32
    dB,  # [programs, B_SIZE] fp32
    outs,
    slots,
    ranks,
    slot_scales,
    scales,
    tables,
    programs,
    blocks,  # programs of a group
    A_SIZE: tl.constexpr,
    B_SIZE: tl.constexpr,
    IS_A: tl.constexpr,
    FOR_EACH: tl.constexpr,
    TIER_RANKS: tl.constexpr,
    SIZES: tl.constexpr,  # of one adapter's gradient, and where it lies: runs of LENGTHS, STRIDES apart, from FIRST
    LENGTHS: tl.constexpr,
    STRIDES: tl.constexpr,
    FIRST: tl.constexpr,
    ROUNDED: tl.constexpr,  # programs, to the next power of two
    BP: tl.constexpr,
    BE: tl.constexpr,
):
    """The gradient of each adapter, `outs[t] [S, ...]`: the parts of those groups that use it, in a fixed order; zeros
    beyond the rank of its slot."""
    s = tl.program_id(0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    for t in tl.static_range(len(outs)):
        if (tl.program_id(2) == t) & (s < tables[t] // 2):
            inside = e < SIZES[t]
            used = inside
            if ranks[t] is not None:
                rank = tl.load(ranks[t] + s)
                if IS_A[t]:
                    used = inside & (e // (SIZES[t] // TIER_RANKS[t]) < rank)
                else:
                    used = inside & (e % TIER_RANKS[t] < rank)
            total = tl.zeros([BE], tl.float32)
            for p0 in range(0, ROUNDED, BP):
                p = p0 + tl.arange(0, BP)
                if slots[t] is not None:
                    mine = tl.load(slots[t] + p // blocks, p < programs, other=-1) == s
                elif FOR_EACH[t]:
                    mine = (p // blocks == s) & (p < programs)
                else:
                    mine = p < programs
                source = FIRST[t] + e // LENGTHS[t] * STRIDES[t] + e % LENGTHS[t]
                wanted = mine[:, None] & used[None, :]
                if IS_A[t]:
                    part = tl.load(dA + p[:, None].to(tl.int64) * A_SIZE + source[None, :], wanted, other=0.0)
                else:
                    part = tl.load(dB + p[:, None].to(tl.int64) * B_SIZE + source[None, :], wanted, other=0.0)
                total += tl.sum(part, 0)
            total *= scales[t]
            if slot_scales[t] is not None:
                total *= tl.load(slot_scales[t] + s)
            target = outs[t] + s.to(tl.int64) * SIZES[t] + e
            tl.store(target, total.to(outs[t].dtype.element_ty), inside)
