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

from ..launch import Constants, Tile, architecture, cdiv, launch, precision
from . import hopper
from .devices import device
from .layout import Layout
from .packing import packed, summed_by_slot
from .quantizing import shrink_quantize
from .rounding import E4M3, FLOAT8
from .tier import Tier
from .triton import backward_rows, gemm, shrink_expand

PRODUCTS = (
    "gemm",
    "shrink_expand",
    "shrink_quantize",
    "backward_rows",
    "forward_tiles",
    "backward_tiles",
)  # kernels that multiply matrices


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], trained: Sequence[bool], plan: str,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y `[G, M, out]` of x `[G, M, in]`; for the backward pass, S = x Aᵀ, and A and B as the kernels use them.

    Args:
        tiers: some, none of them with an empty table.
        trained: which of them need gradients.
        plan: "fused" or "split".
        scale: fp32 `[out]`, of a weight in e4m3; by the plan "fused" alone.
    """
    x = _with_contiguous_rows(x)
    groups, M, width = x.shape
    out = weight.shape[0]
    layout = Layout.of(tiers, trained, out, x.dtype)
    A, B = packed(x, tiers, layout)
    S = x.new_empty(groups * M, layout.ranks)
    y = F.linear(x, weight, bias) if plan == "split" else x.new_empty(groups, M, out)
    if not len(S):
        return y, S, A, B
    if scale is not None:
        _float8(x, weight, scale, bias, A, B, S, y, layout)
        return y, S, A, B
    if plan == "fused" and (columns := hopper.forward_columns(x, weight, layout, x.dtype)):
        hopper.forward(x, weight, bias, A, B, S, y, layout, columns)
        return y, S, A, B
    tile = device(x.device).rows_tile(x.dtype)
    launch(
        shrink_expand, (groups * cdiv(M, tile.BM),), x, A, B, S, y, M, *x.stride(),
        constants=Constants(
            tile, IN=width, OUT=out, EXPAND=plan == "split", STAGES=_prefetched(tile), WIDTH=layout.width,
            **_sizes(layout), **_segments(layout), PRECISION=precision(x.dtype),
        ),
    )  # fmt: skip
    if plan == "fused":
        _gemm(x, weight, bias, S, B, (B.stride(0), B.stride(1), 1), y, layout.R, _segments(layout))
    return y, S, A, B


def _float8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, S: Tensor, y: Tensor,
    layout: Layout,
) -> None:  # fmt: skip
    """The same beside a weight of 8 bits: the kernel that reads x for S also rounds its rows."""
    groups, M, width = x.shape
    tile = device(x.device).rows_tile(x.dtype)
    values, of_rows = torch.empty_like(x, dtype=weight.dtype), x.new_empty(groups * M, dtype=torch.float32)
    launch(
        shrink_quantize, (groups * cdiv(M, tile.BM),), x, A, S, values, of_rows, M, *x.stride(),
        constants=Constants(
            tile, IN=width, RANKS=layout.ranks, CHUNK=layout.chunk, PRECISION=precision(x.dtype),
        ),
    )  # fmt: skip
    strides = B.stride(0), B.stride(1), 1
    _gemm(values, weight, bias, S, B, strides, y, layout.R, _segments(layout), (of_rows, scale))


def backward(
    dy: Tensor, inner: Sequence[Tensor], x: Tensor, weight: Tensor, tiers: Sequence[Tier],
    trained: Sequence[bool], plan: str, needs_x: bool,
) -> list[Tensor]:  # fmt: skip
    """dx where it is needed, and dA, dB of each tier in training; `inner` is what `forward` gave beside y."""
    S, A, B = inner
    dy, x = _with_contiguous_rows(dy), _with_contiguous_rows(x)
    groups, M, width = x.shape
    layout = Layout.of(tiers, trained, weight.shape[0], x.dtype)
    if needs_x and plan == "fused" and hopper.takes_backward(dy, x, weight, layout):
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dA, dB = hopper.backward(dy, x, weight, A, B, S, dx, layout)
        return [dx, *summed_by_slot(dA, dB, tiers, layout, cdiv(M, hopper.ROWS))]
    split = plan == "split"
    tile = device(x.device).rows_tile(x.dtype)
    programs = groups * cdiv(M, tile.BM)
    dA = x.new_empty(programs, len(layout.columns), layout.trained, width, dtype=torch.float32)
    dB = x.new_empty(programs, layout.width, layout.trained, dtype=torch.float32)
    dx, dS = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(S)
    if programs:
        launch(
            backward_rows, (programs,), dy, x, A, B, S, dx, dS, dA, dB, M, *dy.stride(), *x.stride(),
            constants=Constants(
                tile, IN=width, WIDTH=layout.width, TRAINED=layout.trained, KEEP=needs_x and not split,
                EXPAND=needs_x and split, STAGES=_prefetched(tile), **_sizes(layout), **_segments(layout),
                PRECISION=precision(x.dtype),
            ),
        )  # fmt: skip
        if needs_x and split:
            dx.view(-1, width).addmm_(dy.reshape(-1, dy.shape[-1]), weight)
        elif needs_x:
            whole = {"STARTS": (0,), "WIDTHS": (width,), "FIRST": (0,)}
            _gemm(dy, weight.T, None, dS, A, (A.stride(0), 1, A.stride(1)), dx, layout.ranks, whole)
    factors = summed_by_slot(dA, dB, tiers, layout, cdiv(M, tile.BM))
    return [dx, *factors] if needs_x else factors


def _prefetched(tile: Tile) -> int | None:
    """Stages of the loops that read and write y or dX, where there is room for more than Triton's own."""
    return tile.stages if tile.stages > 2 else None


def _gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, strides: tuple[int, int, int], y: Tensor,
    R: int, segments: dict[str, Any], scales: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> None:  # fmt: skip
    """`y = x weightᵀ + bias + S Bᵀ`, B with strides of its groups, columns and ranks; `scales` are of the rows of an x
    and a weight in e4m3."""
    groups, M, K = x.shape
    N = weight.shape[0]
    tile = device(x.device).gemm_tile(y.dtype, M, N)
    chunk = min(R, tile.BK)
    if x.itemsize == 1:
        tile = tile._replace(BK=2 * tile.BK)  # as many bytes
    launch(
        gemm, (groups * cdiv(M, tile.BM) * cdiv(N, tile.BN),), x, weight, *scales, bias, S, B, y, M, *x.stride(),
        *weight.stride(), *strides, constants=Constants(
            tile, N=N, K=K, RANKS=S.shape[1], R=R, CHUNK=chunk, **segments, PRECISION=precision(y.dtype),
            TALL=8,
        ),
    )  # fmt: skip


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """Rows may lie anywhere, but their elements side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
        if architecture() in FLOAT8:
            yield "ViT-B qkv, 8-bit base", partial(_float8_forward, dtype, 768, (8, 8, 8))
            yield "ViT-Ti q, 8-bit base, 4 clients", partial(_float8_forward, dtype, 192, (16, 8, 4), 4, 37, False)


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
        y, *inner = forward(x, weight, empty(out, dtype=dtype) if bias else None, tiers, trained, plan)
        backward(y, inner, x, weight, tiers, trained, plan, needs_x)


def _float8_forward(
    dtype: torch.dtype, width: int, ranks: tuple[int, ...], groups: int = 1, rows: int = 12_608, fused_qkv: bool = True
) -> None:
    """Forward beside a base of 8 bits; its backward pass is that of the weight which these stand for."""
    out = 3 * width if fused_qkv else width

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    columns = [(0, width), (2 * width, width)] if fused_qkv else [(0, width)]
    tiers = [
        Tier(empty(groups, r, width), empty(groups, width, r), 2.0, columns=part) for part in columns for r in ranks
    ]
    weight, scale = empty(out, width, dtype=E4M3), empty(out)
    x, bias = empty(groups, rows, width, dtype=dtype), empty(out, dtype=dtype)
    forward(x, weight, bias, tiers, [False] * len(tiers), "fused", scale)
