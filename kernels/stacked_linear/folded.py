"""The stacked linear layer without a GPU: plain PyTorch with gradients in closed form.

With many rows the adapters are folded into the weight, once a call: `W + Σ scale B A` costs next to nothing then, and
neither do the tiers in the products with x and with dY. With few rows, and beside weights of 16 bits, which would round
small adapters away, the tiers on the same columns are one thin product, added to y and to dX where these lie. Either
way frozen tiers have no part in the gradients of adapters. A has the scale: no other product needs it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_internals import exporting, linear, linear_gradient, without_autocast
from ..twice import differentiable_gradients
from . import reference
from .reference import choose, pick, within
from .tier import Tier, Tiers

ENOUGH = 1  # rows over the width of x from which on a pass over W is cheaper; twice that for groups, a weight for each


def stacked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dtype: torch.dtype
) -> Tensor:
    """As `stacked_linear.stacked_lora_linear`, in this dtype, for a weight and a bias that need no gradient."""
    with without_autocast(x):
        if x.dtype != dtype or weight.dtype != dtype:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        factors: list[Tensor] = [factor for tier in tiers for factor in tier[:2]]
        if isinstance(tiers, Tiers) and tiers.slotless:
            layout = tiers.recall("layout", (x.shape, x.dtype), _arranged, x, weight, tiers)
        else:
            layout = _arranged(x, weight, tiers)
        if torch.is_grad_enabled():
            live = [index for index, factor in enumerate(factors) if factor.requires_grad]
            if live or x.requires_grad:
                call = _Call(layout, factors, live)
                y: Tensor = _StackedLinear.apply(x, weight, bias, call, *[factors[index] for index in live])
                return y
        return _forward(x, weight, bias, layout, *_pack(x, layout, factors))[0]


class _Place(NamedTuple):
    """Of a tier, all but its factors, and where it lies."""

    number: int  # among the tiers
    first: int  # of its ranks among those of all tiers,
    rank: int  # and how many
    scale: float
    slot: Tensor | None
    ranks: Tensor | None
    slot_scales: Tensor | None


class _Segment(NamedTuple):
    """The tiers on the same columns of the output; their ranks are neighbours."""

    columns: tuple[int, int]
    first: int
    ranks: int
    places: list[_Place]


class _Layout(NamedTuple):
    """How tiers lie side by side. Matrices are `[rows, columns]`, or `[G, rows, columns]` if `groups`."""

    groups: int  # 0: no tier tells groups apart
    fold: bool
    scale: float | None  # of all tiers, if it is one
    segments: list[_Segment]


class _Call(NamedTuple):
    """What a call has beside what autograd sees of it."""

    layout: _Layout
    factors: list[Tensor]  # A and B of each tier
    live: list[int]  # which of them need a gradient


def _arranged(x: Tensor, weight: Tensor, tiers: Sequence[Tier]) -> _Layout:
    """How the tiers lie."""
    by_columns: dict[tuple[int, int], list[int]] = {}
    for index, tier in enumerate(tiers):
        by_columns.setdefault(tier.columns or (0, weight.shape[0]), []).append(index)
    needed: dict[tuple[int, int], Tensor | None] = {}  # q and v have the same slots
    same = True
    segments, end, groups, scale = [], 0, 0, tiers[0].scale
    for columns, members in by_columns.items():
        first, places = end, []
        for index in members:
            A, _, own, slot, _, _, ranks, slot_scales = tiers[index]
            slots, rank, _ = A.shape
            if slot is not None:
                key = id(slot), slots
                slot = needed[key] if key in needed else needed.setdefault(key, _needed(slot, slots))
            if slots > 1 or slot is not None:
                groups = x.shape[0]
            same = same and own == scale
            places.append(_Place(index, end, rank, own, slot, ranks, slot_scales))
            end += rank
        segments.append(_Segment(columns, first, end - first, places))
    rows = x.shape[1] if groups else x.numel() // max(x.shape[-1], 1)
    enough = (2 if groups else 1) * ENOUGH * x.shape[-1]
    fold = x.dtype.itemsize >= 4 and rows >= enough
    return _Layout(groups, fold, scale if same else None, segments)


def _needed(slot: Tensor, slots: int) -> Tensor | None:
    """None for slots that say no more than a table says without any: g for group g, or all of them 0 of a single
    one."""
    if not slot.is_cpu or torch.compiler.is_compiling() or exporting():
        return slot
    values = slot.tolist()
    return None if values == list(range(slots)) or (slots == 1 and not any(values)) else slot


def _pack(x: Tensor, layout: _Layout, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A of all tiers `[ranks, in]`, times their scales, and B of each segment `[width, ranks]`; for each group, if
    there are any."""
    groups, dtype = layout.groups, x.dtype

    def side_by_side(pieces: list[Tensor], dim: int) -> Tensor:
        if groups:
            pieces = [piece if piece.shape[0] == groups else piece.expand(groups, -1, -1) for piece in pieces]
        together = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        return together if groups else together[0]

    As, Bs = [], []
    for segment in layout.segments:
        own = []
        for index, _, _, scale, slot, ranks, slot_scales in segment.places:
            A, B = factors[2 * index], factors[2 * index + 1]
            if slot is not None or ranks is not None or slot_scales is not None:
                A, B = choose(Tier(A, B, scale, slot, ranks=ranks, slot_scales=slot_scales))
            As.append(A if layout.scale is not None else A * scale)
            own.append(B)
        together = side_by_side(own, 2)
        Bs.append(together if together.dtype == dtype else together.to(dtype))
    together = side_by_side(As, 1)
    if layout.scale is not None:
        together = together.mul_(layout.scale) if len(As) > 1 else together * layout.scale
    return together if together.dtype == dtype else together.to(dtype), Bs


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: _Layout, A: Tensor, Bs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """y, and what backward needs beside x: the weight with all adapters folded in, or `x Aᵀ` of all of them."""
    if layout.fold:
        folded = weight.expand(x.shape[0], -1, -1).clone() if layout.groups else weight.clone()
        for (columns, first, ranks, _), B in zip(layout.segments, Bs, strict=True):
            _add_product(folded.narrow(-2, *columns), B, A.narrow(-2, first, ranks))
        if not layout.groups:
            return linear(x, folded, bias), folded
        return (x @ folded.mT if bias is None else torch.baddbmm(bias, x, folded.mT)), folded
    rows, out = _rows(x, layout), weight.shape[0]
    y = linear(rows, weight, bias)
    shrunk = rows @ A.mT
    for ((start, width), first, ranks, _), B in zip(layout.segments, Bs, strict=True):
        if width < out:
            _add_product(y.narrow(-1, start, width), shrunk.narrow(-1, first, ranks), B.mT)
        else:
            _add_product(y, shrunk if len(Bs) == 1 else shrunk.narrow(-1, first, ranks), B.mT)
    return (y if rows is x else y.view(*x.shape[:-1], out)), shrunk


def _rows(x: Tensor, layout: _Layout) -> Tensor:
    return x if layout.groups or x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if into.dim() == 3:
        into.baddbmm_(left, right)
    else:
        into.addmm_(left, right)


class _StackedLinear(torch.autograd.Function):
    """Autograd sees x and the factors that need a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, *live: Tensor) -> Tensor:
        A, Bs = _pack(x, call.layout, call.factors)
        y, kept = _forward(x, weight, bias, call.layout, A, Bs)
        ctx.save_for_backward(x, weight, kept, A, *Bs, *call.factors)
        ctx.layout, ctx.live = call.layout, call.live
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept, A, *tensors = ctx.saved_tensors
        layout: _Layout = ctx.layout
        Bs, factors = tensors[: len(layout.segments)], tensors[len(layout.segments) :]
        if torch.is_grad_enabled():

            def again(x: Tensor, *factors: Tensor) -> Tensor:
                return reference.stacked_lora_linear(x, weight, None, _tiers(layout, factors))

            of_x, *of_factors = differentiable_gradients(again, (x, *factors), dy)
            return of_x, None, None, None, *[of_factors[index] for index in ctx.live]
        with without_autocast(x):
            live = set(ctx.live)
            rows, back = _rows(x, layout), _rows(dy, layout)
            dx = linear_gradient(back, kept if layout.fold else weight) if ctx.needs_input_grad[0] else None
            gradients: dict[int, Tensor] = {}
            for segment, B in zip(layout.segments, Bs, strict=True):
                own, expanded = back.narrow(-1, *segment.columns), None
                if dx is not None and not layout.fold:
                    expanded = own @ B
                    _add_product(dx, expanded, A.narrow(-2, segment.first, segment.ranks))
                for place in segment.places:
                    of, at = 2 * place.number, place.first - segment.first
                    if of in live:
                        if expanded is None:  # a contiguous Bᵀ: twice as fast
                            dS = own @ B.narrow(-1, at, place.rank).mT.contiguous().mT
                        else:
                            dS = expanded.narrow(-1, at, place.rank)
                        gradients[of] = _by_slot(dS.mT @ rows, place, factors[of], 1) * place.scale
                    if of + 1 in live:
                        S = (
                            rows @ A.narrow(-2, place.first, place.rank).mT
                            if layout.fold
                            else kept.narrow(-1, place.first, place.rank)
                        )
                        gradients[of + 1] = _by_slot((S.mT @ own).mT, place, factors[of + 1], 2)
        return None if dx is None else dx.view(x.shape), None, None, None, *[gradients[index] for index in ctx.live]


def _tiers(layout: _Layout, factors: Sequence[Tensor]) -> list[Tier]:
    return [
        Tier(
            factors[2 * place.number], factors[2 * place.number + 1], place.scale, place.slot, segment.columns,
            ranks=place.ranks, slot_scales=place.slot_scales,
        )
        for segment in layout.segments
        for place in segment.places
    ]  # fmt: skip


def _by_slot(gradient: Tensor, place: _Place, factor: Tensor, dim: int) -> Tensor:
    """The gradient of a tier's adapters `[S, ...]` from those of the groups, `[G, ...]` or one for all; ranks lie along
    `dim`: 1 of A, 2 of B, which has the scales of the slots."""
    gradient = gradient.to(factor.dtype)
    slots, slot = factor.shape[0], place.slot
    if gradient.dim() == 2:
        gradient = gradient.unsqueeze(0)
    elif slot is not None:
        chosen, used = pick(slot.to(gradient.device))
        gradient = gradient if used is None else gradient.where(used[:, None, None], 0)
        gradient = gradient.new_zeros(slots, *gradient.shape[1:]).index_add_(0, chosen, gradient)
    elif gradient.shape[0] != slots:
        gradient = gradient.sum(0, keepdim=True)
    if dim == 2 and place.slot_scales is not None:
        gradient = (gradient * place.slot_scales[:, None, None]).to(gradient.dtype)
    if place.ranks is None:
        return gradient
    inside = within(place.ranks, factor.shape[dim])
    return gradient.where(inside[:, :, None] if dim == 1 else inside[:, None, :], 0)
