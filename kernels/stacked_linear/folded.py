"""The stacked linear layer without a GPU: plain PyTorch with gradients in closed form.

With many rows the adapters are folded into the weight, once a call: `W + Σ scale B A` costs next to nothing then, and
neither do the tiers in the products with x and with dY. With few rows, and beside weights of 16 bits, which would round
small adapters away, the tiers on the same columns are one thin product, added to y and to dX where these lie. Either
way frozen tiers have no part in the gradients of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import without_autocast
from ..twice import differentiable_gradients
from . import reference
from .reference import choose, pick, within
from .tier import Tier

ENOUGH = 2  # rows that share adapters, over the width of x, from which on a pass over W is cheaper than over y and dX


def stacked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dtype: torch.dtype
) -> Tensor:
    """As `stacked_linear.stacked_lora_linear`, in this dtype, for a weight and a bias that need no gradient."""
    with without_autocast(x):
        if x.dtype != dtype or weight.dtype != dtype:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        factors = [factor for tier in tiers for factor in (tier.A, tier.B)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *factors)):
            places = [_Place(tier.scale, tier.slot, tier.columns, tier.ranks) for tier in tiers]
            y: Tensor = _StackedLinear.apply(x, weight, bias, places, *factors)
            return y
        return _forward(x, weight, bias, *_pack(x, weight, tiers))[0]


class _Place(NamedTuple):
    """A tier without its factors."""

    scale: float
    slot: Tensor | None
    columns: tuple[int, int] | None
    ranks: Tensor | None


def _tiers(places: Sequence[_Place], factors: Sequence[Tensor]) -> list[Tier]:
    return [
        Tier(A, B, place.scale, place.slot, place.columns, ranks=place.ranks)
        for place, A, B in zip(places, factors[::2], factors[1::2], strict=True)
    ]


class _Segment(NamedTuple):
    """The tiers on the same columns of the output."""

    columns: tuple[int, int]
    first: int  # of their ranks among those of all segments,
    ranks: int  # and how many they have together
    scale: float  # of what they add; 1 where they differ in it, and B is scaled
    places: dict[int, tuple[int, int]]  # of each tier, by its index: its first rank among these, and how many


class _Layout(NamedTuple):
    """How tiers lie side by side. Matrices are `[rows, columns]`, or `[G, rows, columns]` if `grouped`."""

    grouped: bool  # some tier tells groups apart
    fold: bool
    segments: list[_Segment]


def _pack(x: Tensor, weight: Tensor, tiers: Sequence[Tier]) -> tuple[_Layout, Tensor, list[Tensor]]:
    """The layout, A of all tiers `[ranks, in]`, and B of each segment `[width, ranks]`; for each group, if grouped."""
    by_columns: dict[tuple[int, int], list[int]] = {}
    grouped = False
    for index, tier in enumerate(tiers):
        by_columns.setdefault(tier.columns or (0, weight.shape[0]), []).append(index)
        grouped = grouped or tier.tells_groups_apart
    groups, dtype = x.shape[0] if grouped else 1, x.dtype

    def side_by_side(factors: list[Tensor], dim: int) -> Tensor:
        if grouped:
            factors = [factor if factor.shape[0] == groups else factor.expand(groups, -1, -1) for factor in factors]
        together = factors[0] if len(factors) == 1 else torch.cat(factors, dim)
        together = together if together.dtype == dtype else together.to(dtype)
        return together if grouped else together[0]

    segments: list[_Segment] = []
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    picked: dict[int, tuple[Tensor, Tensor | None]] = {}
    start = 0
    for columns, members in by_columns.items():
        scales = {tiers[index].scale for index in members}
        scale = scales.pop() if len(scales) == 1 else 1.0
        own, places, count = [], {}, 0
        for index in members:
            tier = tiers[index]
            if tier.slot is not None and id(tier.slot) not in picked:  # q and v have the same slots
                picked[id(tier.slot)] = pick(tier.slot.to(x.device))
            A, B = choose(tier, picked.get(id(tier.slot)))
            As.append(A)
            own.append(B if tier.scale == scale else B * tier.scale)
            places[index] = count, A.shape[1]
            count += A.shape[1]
        segments.append(_Segment(columns, start, count, scale, places))
        Bs.append(side_by_side(own, 2))
        start += count
    rows = x.shape[1] if grouped else x.numel() // max(x.shape[-1], 1)
    fold = dtype.itemsize >= 4 and rows >= ENOUGH * x.shape[-1]
    return _Layout(grouped, fold, segments), side_by_side(As, 1), Bs


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: _Layout, A: Tensor, Bs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """y, and what backward needs beside x: the weight with all adapters folded in, or `x Aᵀ` of all of them."""
    if layout.fold:
        folded = weight.expand(x.shape[0], -1, -1).clone() if layout.grouped else weight.clone()
        for segment, B in zip(layout.segments, Bs, strict=True):
            own = A.narrow(-2, segment.first, segment.ranks)
            _add_product(folded.narrow(-2, *segment.columns), B, own, segment.scale)
        if not layout.grouped:
            return F.linear(x, folded, bias), folded
        return (x @ folded.mT if bias is None else torch.baddbmm(bias, x, folded.mT)), folded
    y = F.linear(x, weight, bias)
    shrunk = _rows(x, layout) @ A.mT
    into = _rows(y, layout)
    for segment, B in zip(layout.segments, Bs, strict=True):
        own = shrunk.narrow(-1, segment.first, segment.ranks)
        _add_product(into.narrow(-1, *segment.columns), own, B.mT, segment.scale)
    return y, shrunk


def _rows(x: Tensor, layout: _Layout) -> Tensor:
    return x if layout.grouped or x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _add_product(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    if into.dim() == 3:
        into.baddbmm_(left, right, alpha=scale)
    else:
        into.addmm_(left, right, alpha=scale)


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, places: list[_Place], *factors: Tensor
    ) -> Tensor:
        layout, A, Bs = _pack(x, weight, _tiers(places, factors))
        y, kept = _forward(x, weight, bias, layout, A, Bs)
        ctx.save_for_backward(x, weight, kept, A, *factors, *Bs)
        ctx.layout, ctx.places = layout, places
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept, A, *tensors = ctx.saved_tensors
        count = 2 * len(ctx.places)
        factors, Bs = tensors[:count], tensors[count:]
        if torch.is_grad_enabled():

            def again(x: Tensor, *factors: Tensor) -> Tensor:
                return reference.stacked_lora_linear(x, weight, None, _tiers(ctx.places, factors))

            of_x, *of_factors = differentiable_gradients(again, (x, *factors), dy)
            return of_x, None, None, None, *of_factors
        with without_autocast(x):
            layout: _Layout = ctx.layout
            rows, back = _rows(x, layout), _rows(dy, layout)
            dx = (back @ (kept if layout.fold else weight)) if ctx.needs_input_grad[0] else None
            gradients: list[Tensor | None] = [None] * count
            for segment, B in zip(layout.segments, Bs, strict=True):
                own, expanded = back.narrow(-1, *segment.columns), None
                if dx is not None and not layout.fold:
                    expanded = own @ B
                    _add_product(dx, expanded, A.narrow(-2, segment.first, segment.ranks), segment.scale)
                for index, (first, rank) in segment.places.items():
                    of_A, of_B = ctx.needs_input_grad[4 + 2 * index : 6 + 2 * index]
                    place, at = ctx.places[index], segment.first + first
                    if of_A:
                        if expanded is None:  # a contiguous Bᵀ: twice as fast
                            dS = own @ B.narrow(-1, first, rank).mT.contiguous().mT
                        else:
                            dS = expanded.narrow(-1, first, rank)
                        gradients[2 * index] = _by_slot(dS.mT @ rows, segment.scale, place, factors[2 * index], 1)
                    if of_B:
                        S = rows @ A.narrow(-2, at, rank).mT if layout.fold else kept.narrow(-1, at, rank)
                        dB = (S.mT @ own).mT
                        gradients[2 * index + 1] = _by_slot(dB, place.scale, place, factors[2 * index + 1], 2)
        return None if dx is None else dx.view(x.shape), None, None, None, *gradients


def _by_slot(gradient: Tensor, scale: float, place: _Place, factor: Tensor, dim: int) -> Tensor:
    """The gradient of a tier's adapters `[S, ...]` from those of the groups, `[G, ...]` or one for all; ranks lie along
    `dim`."""
    gradient = gradient.to(factor.dtype) * scale
    slots, slot = factor.shape[0], place.slot
    if gradient.dim() == 2:
        gradient = gradient.unsqueeze(0)
    elif slot is not None:
        chosen, used = pick(slot.to(gradient.device))
        gradient = gradient if used is None else gradient.where(used[:, None, None], 0)
        gradient = gradient.new_zeros(slots, *gradient.shape[1:]).index_add_(0, chosen, gradient)
    elif gradient.shape[0] != slots:
        gradient = gradient.sum(0, keepdim=True)
    if place.ranks is None:
        return gradient
    inside = within(place.ranks, factor.shape[dim])
    return gradient.where(inside[:, :, None] if dim == 1 else inside[:, None, :], 0)
