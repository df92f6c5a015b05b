"""Penalties without a GPU: plain PyTorch with the gradient in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..twice import differentiable_gradients
from . import reference

WIDE = 16  # ranks from which on a CPU's product is no slower with its long side first


def gram_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> Tensor:
    """As `overlaps.gram_penalty` for each slot, against at least one tier that needs no gradient."""
    penalties: Tensor = _GramPenalty.apply(active, gammas, *frozen)
    return penalties


class _GramPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Tensor, gammas: Sequence[float], *frozen: Tensor) -> Tensor:
        slots = max(B.shape[1] for B in (active, *frozen))
        count, _, out, rank = active.shape
        side_by_side = torch.cat([B.expand(-1, slots, -1, -1) for B in frozen], -1).flatten(0, 1)  # [P S, out, R]
        weights = active.new_tensor([gamma for B, gamma in zip(frozen, gammas, strict=True) for _ in range(B.shape[3])])
        own = active.expand(-1, slots, -1, -1).reshape(-1, out, rank)
        ctx.wide = rank >= WIDE
        # [P S, R, r] or, so that the short side comes first, [P S, r, R]
        overlap = torch.bmm(side_by_side.mT, own) if ctx.wide else torch.bmm(own.mT, side_by_side)
        weighted = overlap * (weights[:, None] if ctx.wide else weights)
        ctx.save_for_backward(active, weighted, side_by_side, *frozen)
        ctx.gammas = gammas
        return (overlap * weighted).view(count, slots, -1).sum((0, 2))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        active, weighted, side_by_side, *frozen = ctx.saved_tensors
        nothing = [None] * (1 + len(frozen))
        if torch.is_grad_enabled():

            def again(active: Tensor) -> Tensor:
                return reference.gram_penalty(active, frozen, ctx.gammas, per_slot=True)

            return differentiable_gradients(again, [active], upstream)[0], *nothing
        count, slots = active.shape[:2]
        scaled = (weighted.view(count, -1, *weighted.shape[1:]) * (2 * upstream)[:, None, None]).flatten(0, 1)
        product = torch.bmm(side_by_side, scaled) if ctx.wide else torch.bmm(scaled, side_by_side.mT).mT
        gradient = product.unflatten(0, (count, -1))
        return gradient if slots == gradient.shape[1] else gradient.sum(1, keepdim=True), *nothing
