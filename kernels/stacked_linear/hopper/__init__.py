"""The stacked linear layer in one kernel a direction, for GPUs of sm_90, in Gluon: when it can be, and its launches.

Both kernels are persistent: a program goes over tiles of the output, and copies (TMA) of the next tile's operands are
under way while it finishes one. A ring of buffers holds what a step multiplies, with a barrier each that tells when the
copies have arrived. Every tile of columns, of y forward and of dY backward, lies within one segment or outside of all.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...launch import Constants, cdiv, launch, processors
from ..devices import device
from ..layout import Layout
from .backward import backward_tiles
from .forward import forward_tiles

ROWS, STEP = 128, 64  # of a tile, and columns that are multiplied at once
WIDE, THIN = 128, 64  # columns of a tile of dX: 192, of which 768 is a multiple
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def forward_columns(x: Tensor, weight: Tensor, layout: Layout, dtype: torch.dtype) -> int:
    """Columns of a tile of y; 0 where the kernel does not take the call.

    Args:
        x: `[G, M, in]`.
        weight: `[out, in]`.
        dtype: that the product is taken in.
    """
    out = weight.shape[0]
    if out % 8 == 0 and _takes(x, layout, dtype) and _aligned(weight):
        for columns in (256, 128, 64):
            ends = ((start, start + width) for start, width, _ in layout.columns)
            if all(start % columns == 0 and (end % columns == 0 or end == out) for start, end in ends):
                return columns
    return 0


def takes_backward(dy: Tensor, x: Tensor, weight: Tensor, layout: Layout) -> bool:
    """Whether the kernel takes a backward pass that needs dX."""
    in_steps = all(start % STEP == 0 and width % STEP == 0 for start, width, _ in layout.columns)
    return in_steps and _takes(x, layout, x.dtype) and _aligned(dy) and _aligned(weight)


def _takes(x: Tensor, layout: Layout, dtype: torch.dtype) -> bool:
    least = device(x.device).one_kernel_from
    if least is None or x.shape[1] < least or dtype not in DTYPES or layout.R > STEP:
        return False
    columns = sorted(layout.columns)
    return _aligned(x) and all(one[0] + one[1] <= other[0] for one, other in pairwise(columns))


def _aligned(tensor: Tensor) -> bool:
    """As copies of tiles need it: begun, and strided, by multiples of 16 bytes, none of them zero."""
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.shape[-1] % 8 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in tensor.stride()[:-1])
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    y: Tensor,
    layout: Layout,
    columns: int,
) -> None:
    """Fills S and y, with packed adapters, in tiles of so many columns."""
    groups, M, width = x.shape
    out = weight.shape[0]
    blocks = cdiv(M, ROWS)
    half = min(columns, 128)
    launch(
        forward_tiles, (min(groups * blocks * cdiv(out, columns), processors()),),
        _tiles(x, 1, ROWS, STEP), _tiles(weight, columns, STEP), _tiles(A.flatten(0, 1), layout.R, STEP),
        _tiles(B.flatten(0, 1), columns, layout.R), _tiles(y, 1, ROWS, half), bias, S, M, groups * blocks, blocks,
        constants=_forward_constants(layout, width, out),
    )  # fmt: skip


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, S: Tensor, dx: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Fills dX. Returns parts of dA `[G blocks of rows, segments, trained, in]` and dB `[G blocks, width, trained]`."""
    groups, M, width = x.shape
    blocks = cdiv(M, ROWS)
    dA = x.new_empty(groups * blocks, len(layout.columns), layout.trained, width, dtype=torch.float32)
    dB = x.new_empty(groups * blocks, layout.width, layout.trained, dtype=torch.float32)
    A = A.flatten(0, 1)
    launch(
        backward_tiles, (min(groups * blocks * cdiv(width, WIDE + THIN), processors()),),
        _tiles(dy, 1, ROWS, STEP), _tiles(weight, STEP, WIDE), _tiles(weight, STEP, THIN),
        _tiles(A, layout.R, WIDE), _tiles(A, layout.R, THIN), _tiles(B.flatten(0, 1), STEP, layout.R),
        _tiles(S.view(groups, M, -1), 1, ROWS, layout.R), _tiles(x, 1, ROWS, THIN), _tiles(dx, 1, ROWS, THIN), dA, dB,
        groups * blocks, blocks, constants=_backward_constants(layout, width, weight.shape[0]),
    )  # fmt: skip
    return dA, dB


def _tiles(tensor: Tensor, *block: int) -> TensorDescriptor:
    """A tensor, to be copied in blocks."""
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), list(block), _shared(block, tensor.dtype)
    )


@cache
def _shared(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a block lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[dtype])


@cache
def _forward_constants(layout: Layout, width: int, out: int) -> Constants:
    return Constants(N=out, STEPS=cdiv(width, STEP), **_segments(layout), STAGES=3, num_warps=8)


@cache
def _backward_constants(layout: Layout, width: int, out: int) -> Constants:
    ends = [0, *(start + width for start, width, _ in sorted(layout.columns))]
    starts = [*(start for start, _, _ in sorted(layout.columns)), out]
    rest = tuple((end, start - end) for end, start in zip(ends, starts, strict=True) if start > end)
    stages = 3 if layout.R <= 32 else 2  # of 227 KB
    return Constants(IN=width, TRAINED=layout.trained, REST=rest, **_segments(layout), STAGES=stages, num_warps=8)


def _segments(layout: Layout) -> dict[str, Any]:
    starts, widths, first = zip(*layout.columns, strict=True)
    return {
        "RANKS": layout.ranks, "R": layout.R, "WIDTH": layout.width, "STARTS": starts, "WIDTHS": widths, "FIRST": first,
        "TALL": 8,
    }  # fmt: skip
