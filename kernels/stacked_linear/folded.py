"""The stacked linear layer without a GPU: plain PyTorch with gradients in closed form. It needs fp32 or fp64.

Adapters are folded into the weight once a call. With more rows than the weight is wide, `W + Σ scale B A` costs next to
nothing, and then the tiers cost nothing at all in the products with x and with dY, frozen ones not even in the
gradients. (Narrower weights would round small adapters away.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..twice import differentiable_gradients
from . import reference
from .reference import choose, within
from .tier import Tier


def stacked_lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier]) -> Tensor:
    """As `stacked_linear.stacked_lora_linear`, for a weight and a bias that need no gradient."""
    factors = [factor for tier in tiers for factor in (tier.A, tier.B)]
    places = [_Place(tier.scale, tier.slot, tier.columns, tier.ranks) for tier in tiers]
    y: Tensor = _StackedLinear.apply(x, weight, bias, places, *factors)
    return y


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


class _StackedLinear(torch.autograd.Function):
    """Matrices are `[rows, columns]`, or `[G, rows, columns]` where tiers tell groups apart."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, places: list[_Place], *factors: Tensor
    ) -> Tensor:
        tiers = _tiers(places, factors)
        grouped = any(tier.tells_groups_apart for tier in tiers)
        rows = x if grouped else x.reshape(-1, x.shape[-1])
        folded = weight.expand(len(x), -1, -1).clone() if grouped else weight.clone()
        saved: list[Tensor] = []
        ctx.trained = []
        for index, tier in enumerate(tiers):
            A, B = (factor.to(x.dtype) if grouped else factor[0].to(x.dtype) for factor in choose(tier))
            into = folded if tier.columns is None else folded.narrow(-2, *tier.columns)
            if grouped:
                into.baddbmm_(B.expand(len(x), -1, -1), A.expand(len(x), -1, -1), alpha=tier.scale)
            else:
                into.addmm_(B, A, alpha=tier.scale)
            needs = ctx.needs_input_grad[4 + 2 * index : 6 + 2 * index]
            if any(needs):
                saved += A, B
                ctx.trained.append((index, needs, places[index], tier.A.shape, (tier.A.dtype, tier.B.dtype)))
        ctx.save_for_backward(x, weight, folded, *factors, *saved)
        ctx.grouped, ctx.places = grouped, places
        if grouped:
            return rows @ folded.mT if bias is None else torch.baddbmm(bias, rows, folded.mT)
        return F.linear(x, folded, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, folded, *tensors = ctx.saved_tensors
        count = 2 * len(ctx.places)
        if torch.is_grad_enabled():

            def again(x: Tensor, *factors: Tensor) -> Tensor:
                return reference.stacked_lora_linear(x, weight, None, _tiers(ctx.places, factors))

            of_x, *of_factors = differentiable_gradients(again, (x, *tensors[:count]), dy)
            return of_x, None, None, None, *of_factors
        rows = x if ctx.grouped else x.reshape(-1, x.shape[-1])
        factors = tensors[count:]
        dx = dy @ folded if ctx.needs_input_grad[0] else None
        dy = dy.reshape(*rows.shape[:-1], dy.shape[-1])
        gradients: list[Tensor | None] = [None] * count
        for (index, needs, place, (slots, rank, _), dtypes), A, B in zip(
            ctx.trained, factors[::2], factors[1::2], strict=True
        ):
            own = dy if place.columns is None else dy.narrow(-1, *place.columns)
            used = None if place.ranks is None else within(place.ranks, rank)
            if needs[0]:
                shrunk = own @ B.mT.contiguous().mT  # a contiguous Bᵀ: twice as fast
                dA = _by_slot(shrunk.mT @ rows, place.scale, place.slot, slots)
                gradients[2 * index] = (dA if used is None else dA.where(used[:, :, None], 0)).to(dtypes[0])
            if needs[1]:
                shrunk = rows @ A.mT
                dB = _by_slot((shrunk.mT @ own).mT, place.scale, place.slot, slots)
                gradients[2 * index + 1] = (dB if used is None else dB.where(used[:, None, :], 0)).to(dtypes[1])
        return dx, None, None, None, *gradients


def _by_slot(gradient: Tensor, scale: float, slot: Tensor | None, slots: int) -> Tensor:
    """Gradients of a tier's adapters `[S, ...]` from those of the groups `[G, ...]`."""
    gradient = gradient * scale
    if gradient.dim() == 2:
        return gradient.unsqueeze(0)
    if slot is None:
        return gradient if len(gradient) == slots else gradient.sum(0, keepdim=True)
    slot = slot.to(gradient.device, torch.long)
    used = gradient.where((slot >= 0)[:, None, None], 0)
    return gradient.new_zeros(slots, *gradient.shape[1:]).index_add_(0, slot.clamp_min(0), used)
