"""The stacked linear layer by its kernels, forward and backward, by either of two plans.

"fused": one product whose accumulator takes the low-rank part as one more step. "split": the base product by cuBLAS,
then one kernel that reads x and adds the low-rank part to y in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import SMALL, Tile, architecture, cdiv, int32, launch, power_of_two, precision
from . import hopper
from .layout import Layout
from .slots import pack, sum_by_slot
from .tier import Tier
from .triton import backward_rows, gemm, shrink_expand

PRODUCTS = ("gemm", "shrink_expand", "backward_rows", "forward_tiles", "backward_tiles")  # kernels that multiply matrices


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], trained: Sequence[bool], plan: str
) -> tuple[Tensor, Tensor]:
    """y `[G, M, out]` of x `[G, M, in]`, and S = x Aᵀ for the backward pass.

    Args:
        tiers: some, none of them with an empty table.
        trained: which of them need gradients.
        plan: "fused" or "split".
    """
    x = _with_contiguous_rows(x)
    groups, M, width = x.shape
    out = weight.shape[0]
    layout = Layout.of(tiers, trained, out, x.dtype)
    A, B = _pack(x, tiers, layout)
    S = x.new_empty(groups * M, layout.ranks)
    y = F.linear(x, weight, bias) if plan == "split" else x.new_empty(groups, M, out)
    if not len(S):
        return y, S
    if plan == "fused" and (columns := hopper.forward_columns(x, weight, layout)):
        hopper.forward(x, weight, bias, A, B, S, y, layout, columns)
        return y, S
    tile = rows_tile(x.dtype, stages=3)
    launch(
        shrink_expand, (groups * cdiv(M, tile.BM),), x, A, B, S, y, M, *x.stride(),
        IN=width, OUT=out, EXPAND=plan == "split", WIDTH=layout.width, **_sizes(layout), **_segments(layout),
        PRECISION=precision(x.dtype), tile=tile,
    )  # fmt: skip
    if plan == "fused":
        _gemm(x, weight, bias, S, B, (B.stride(0), B.stride(1), 1), y, layout.R, _segments(layout))
    return y, S


def backward(
    dy: Tensor, S: Tensor, x: Tensor, weight: Tensor, tiers: Sequence[Tier], trained: Sequence[bool], plan: str,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """dx where it is needed, and dA, dB of each tier in training."""
    dy, x = _with_contiguous_rows(dy), _with_contiguous_rows(x)
    groups, M, width = x.shape
    layout = Layout.of(tiers, trained, weight.shape[0], x.dtype)
    A, B = _pack(x, tiers, layout)
    split = needs_x and plan == "split"
    if plan == "fused" and needs_x and hopper.takes_backward(dy, x, weight, layout):
        whole = torch.empty_like(x, memory_format=torch.contiguous_format)
        dA, dB = hopper.backward(dy, x, weight, A, B, S, whole, layout)
        return whole, _sum_by_slot(dA, dB, tiers, layout, len(dA), cdiv(M, hopper.ROWS))
    dx = (dy @ weight if split else torch.empty_like(x, memory_format=torch.contiguous_format)) if needs_x else None
    tile = rows_tile(x.dtype, stages=2)
    programs = groups * cdiv(M, tile.BM)
    dA = x.new_empty(programs, len(layout.columns), layout.trained, width, dtype=torch.float32)
    dB = x.new_empty(programs, layout.width, layout.trained, dtype=torch.float32)
    dS = torch.empty_like(S)
    if programs:
        launch(
            backward_rows, (programs,), dy, x, A, B, S, dx if split else S, dS, dA, dB, M, *dy.stride(),
            *x.stride(), IN=width, WIDTH=layout.width, TRAINED=layout.trained, KEEP=needs_x and not split,
            EXPAND=split, **_sizes(layout), **_segments(layout), PRECISION=precision(x.dtype), tile=tile,
        )  # fmt: skip
        if dx is not None and not split:
            whole = {"STARTS": (0,), "WIDTHS": (width,), "FIRST": (0,)}
            _gemm(dy, weight.T, None, dS, A, (A.stride(0), 1, A.stride(1)), dx, layout.ranks, whole)
    return dx, _sum_by_slot(dA, dB, tiers, layout, programs, cdiv(M, tile.BM))


def gemm_tile(dtype: torch.dtype, rows: int, columns: int) -> Tile:
    """Tiles of the base product, for so many rows of a group. They fit the architectures that `precompile` looks at."""
    arch = architecture()
    if not arch:
        return SMALL
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 2)
    if rows <= 64:
        return Tile(64, 128, 64, 4, 3)
    if 90 <= arch < 120 and columns % 256 == 0:  # sm_120 has the shared memory of sm_89
        return Tile(128, 256, 64, 8, 3)
    return Tile(128, 128, 64, 8, 3)


def rows_tile(dtype: torch.dtype, stages: int) -> Tile:
    """Tiles of the kernels that own some rows and go over all columns."""
    arch = architecture()
    if not arch:
        return SMALL
    if dtype == torch.float32:
        return Tile(32, 32, 16, 8, 2)
    return Tile(64, 64, 64, 4 if arch >= 90 else 8, stages)


def _pack(x: Tensor, tiers: Sequence[Tier], layout: Layout) -> tuple[Tensor, Tensor]:
    """A `[G, ranks, in]` and B `[G, width, R]` of the adapters that the groups use, in the dtype of x."""
    groups, _, width = x.shape
    A = x.new_empty(groups, layout.ranks, width)
    B = x.new_empty(groups, layout.width, layout.R)
    places = [layout.columns[entry.segment] for entry in layout.entries]
    block = 64 if max(entry.filled for entry in layout.entries) < 64 else 16
    launch(
        pack, (groups, cdiv(max(width, *(place[1] for place in places)), block), len(tiers)),
        tuple(tier.A.contiguous() for tier in tiers), tuple(tier.B.contiguous() for tier in tiers),
        *_tables(tiers, x), A, B, IN=width, WIDTH=layout.width, RANKS=layout.ranks, R=layout.R, **_constants(tiers),
        SEGMENTS=tuple(entry.segment for entry in layout.entries),
        OFFSETS=tuple(entry.offset for entry in layout.entries),
        FILLED=tuple(entry.filled for entry in layout.entries),
        PADDED=tuple(power_of_two(entry.filled) for entry in layout.entries),
        WIDTHS=tuple(place[1] for place in places), FIRST=tuple(place[2] for place in places),
        PRECISION=precision(x.dtype), BLOCK=block,
    )  # fmt: skip
    return A, B


def _gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, strides: tuple[int, int, int], y: Tensor,
    R: int, segments: dict[str, Any],
) -> None:  # fmt: skip
    """`y = x weightᵀ + bias + S Bᵀ`, B with strides of its groups, columns and ranks."""
    groups, M, K = x.shape
    N = weight.shape[0]
    tile = gemm_tile(x.dtype, M, N)
    launch(
        gemm, (groups * cdiv(M, tile.BM) * cdiv(N, tile.BN),), x, weight, bias, S, B, y, M, *x.stride(),
        *weight.stride(), *strides, N=N, K=K, RANKS=S.shape[1], R=R, CHUNK=min(R, tile.BK), **segments,
        PRECISION=precision(x.dtype), TALL=8, tile=tile,
    )  # fmt: skip


def _sum_by_slot(
    dA: Tensor, dB: Tensor, tiers: Sequence[Tier], layout: Layout, programs: int, blocks: int
) -> list[Tensor]:
    """The gradients of the tiers in training, in the dtype of their factors, from the parts of all programs."""
    trained = [(tier, entry) for tier, entry in zip(tiers, layout.entries, strict=True) if entry.trained]
    if not trained:
        return []
    width = dA.shape[-1]
    outs: list[Tensor] = []
    runs = []
    for tier, entry in trained:
        outs += (
            torch.empty_like(tier.A, memory_format=torch.contiguous_format),
            torch.empty_like(tier.B, memory_format=torch.contiguous_format),
        )
        size = tier.rank * width
        runs.append((size, size, size, (entry.segment * layout.trained + entry.offset) * width))
        first = layout.columns[entry.segment][2] * layout.trained + entry.offset
        runs.append((tier.B.shape[1] * tier.rank, tier.rank, layout.trained, first))
    sizes, lengths, strides, firsts = zip(*runs, strict=True)
    # The scale is in the packed B, hence in dS and dA.
    both = [tier._replace(scale=scale) for tier, _ in trained for scale in (1.0, tier.scale)]
    BP, BE = 32, 128
    launch(
        sum_by_slot, (max(tier.A.shape[0] for tier in both), cdiv(max(sizes), BE), len(outs)), dA, dB, tuple(outs),
        *_tables(both, dA), programs, max(blocks, 1), A_SIZE=dA[:1].numel() or 1, B_SIZE=dB.stride(0),
        IS_A=tuple(index % 2 == 0 for index in range(len(both))), **_constants(both), SIZES=sizes, LENGTHS=lengths,
        STRIDES=strides, FIRST=firsts,
        ROUNDED=max(power_of_two(programs), BP) if programs else 0, BP=BP, BE=BE,
    )  # fmt: skip
    return outs


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """Rows may lie anywhere, but their elements side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables(tiers: Sequence[Tier], like: Tensor) -> tuple[Any, ...]:
    """Slots, ranks, scales and sizes of the tiers' tables, as the kernels of `slots` take them."""
    return (
        tuple(int32(tier.slot, like) for tier in tiers),
        tuple(int32(tier.ranks, like) for tier in tiers),
        tuple(tier.scale for tier in tiers),
        tuple(2 * tier.A.shape[0] + 1 for tier in tiers),
    )


def _constants(tiers: Sequence[Tier]) -> dict[str, Any]:
    return {
        "FOR_EACH": tuple(tier.slot is None and tier.A.shape[0] > 1 for tier in tiers),
        "TIER_RANKS": tuple(tier.rank for tier in tiers),
    }


def _sizes(layout: Layout) -> dict[str, Any]:
    return {"RANKS": layout.ranks, "R": layout.R, "CHUNK": layout.chunk}


def _segments(layout: Layout) -> dict[str, Any]:
    starts, widths, first = zip(*layout.columns, strict=True)
    return {"STARTS": starts, "WIDTHS": widths, "FIRST": first}


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What to compile for a dtype of x."""
    yield "ViT-B qkv, r 8+8+8", partial(_step, dtype, 768, (8, 8, 8))
    if dtype == torch.float16:
        return
    ti = partial(_step, dtype, 192, (16, 8, 4), groups=4, rows=37, fused_qkv=False)
    yield "ViT-Ti q, r 16+8+4, 4 clients", ti
    yield "ViT-Ti q, of ranks up to these", partial(ti, ranks_differ=True)
    for name, trained in (("none", [False] * 3), ("all", [True] * 3)):
        yield f"ViT-B qkv, {name} trained", partial(_step, dtype, 768, (8, 8, 8), trained=trained)
    yield "width 200, r 64+64+64", partial(_step, dtype, 200, (64, 64, 64), fused_qkv=False, bias=False)
    if dtype == torch.bfloat16:
        yield "ViT-S qkv, r 8", partial(_step, dtype, 384, (8,))
        yield "ViT-H qkv, r 8", partial(_step, dtype, 1280, (8,))
        yield "ViT-B qkv, first layer", partial(_step, dtype, 768, (8, 8, 8), needs_x=False)


def _step(
    dtype: torch.dtype, width: int, ranks: tuple[int, ...], groups: int = 1, rows: int = 12_608,
    fused_qkv: bool = True, bias: bool = True, needs_x: bool = True, ranks_differ: bool = False,
    trained: Sequence[bool] | None = None,
) -> None:  # fmt: skip
    """Forward and backward by both plans, on tensors without values; the last tier is in training by default."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    out = 3 * width if fused_qkv else width
    x, weight = empty(groups, rows, width, dtype=dtype), empty(out, width, dtype=dtype)
    slot = empty(groups, dtype=torch.int32) if groups > 1 else None
    columns = [(0, width), (2 * width, width)] if fused_qkv else [(0, width)]
    table = 4 if groups > 1 else 1
    of_slots = empty(table, dtype=torch.int32) if ranks_differ else None
    tiers = [
        Tier(empty(table, r, width), empty(table, width, r), 2.0, slot, part, ranks=of_slots)
        for part in columns
        for r in ranks
    ]
    trained = list(trained or [False] * (len(ranks) - 1) + [True]) * len(columns)
    for plan in ("fused", "split"):
        y, S = forward(x, weight, empty(out, dtype=dtype) if bias else None, tiers, trained, plan)
        backward(y, S, x, weight, tiers, trained, plan, needs_x)
