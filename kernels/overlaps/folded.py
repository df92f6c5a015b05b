"""Penalties without a GPU: plain PyTorch with the gradient in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..twice import differentiable_gradients
from . import reference


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
        overlap = torch.bmm(active.expand(-1, slots, -1, -1).reshape(-1, out, rank).mT, side_by_side)  # [P S, r, R]
        weighted = overlap * weights
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
        count, slots, out, rank = active.shape
        scaled = weighted.view(count, -1, *weighted.shape[1:]) * (2 * upstream)[:, None, None]
        gradient = torch.bmm(scaled.flatten(0, 1), side_by_side.mT).view(count, -1, rank, out)
        gradient = gradient if slots == gradient.shape[1] else gradient.sum(1, keepdim=True)
        return gradient.mT, *nothing
