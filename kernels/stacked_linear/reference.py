"""The stacked linear layer in plain PyTorch: the specification. G groups of M rows, S adapters in a tier's table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .tier import Tier


def stacked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float = 0.0
) -> Tensor:
    """As `stacked_linear.stacked_lora_linear`."""
    return plus_tiers(F.linear(x, weight, bias), x, tiers, dropout)


def plus_tiers(y: Tensor, x: Tensor, tiers: Sequence[Tier], dropout: float) -> Tensor:
    """What the tiers add to `y` `[..., out]`, the product with the base, of x `[..., in]`, and y itself."""
    by_columns: dict[tuple[int, int], list[Tier]] = {}
    for tier in tiers:
        if len(tier.A):
            by_columns.setdefault(tier.columns or (0, y.shape[-1]), []).append(tier)
    if not by_columns:
        return y
    x = F.dropout(x.to(y.dtype), dropout) if dropout else x.to(y.dtype)
    pieces: list[Tensor] = []
    end = 0
    for start, width in sorted(by_columns):
        if start < end:
            y = y + _place(pieces, end, y)  # overlapping columns: start another sheet
            pieces, end = [], 0
        if start > end:
            pieces.append(y.new_zeros(1).expand(*y.shape[:-1], start - end))
        pieces.append(_low_rank(x, by_columns[start, width]))
        end = start + width
    return y + _place(pieces, end, y)


def _place(pieces: list[Tensor], end: int, y: Tensor) -> Tensor:
    if end < y.shape[-1]:
        pieces.append(y.new_zeros(1).expand(*y.shape[:-1], y.shape[-1] - end))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _low_rank(x: Tensor, tiers: list[Tier]) -> Tensor:
    """Tiers on the same columns are one product of their summed rank: `x [A1; A2]ᵀ [s1 B1, s2 B2]ᵀ`."""
    chosen = [choose(tier) for tier in tiers]
    groups = max(len(A) for A, _ in chosen)
    A = torch.cat([A.to(x.dtype).expand(groups, -1, -1) for A, _ in chosen], dim=1)  # [G, R, in]
    scaled = [(B * tier.scale).to(x.dtype) for tier, (_, B) in zip(tiers, chosen, strict=True)]
    B = torch.cat([B.expand(groups, -1, -1) for B in scaled], dim=2)  # [G, width, R]
    shrunk = F.linear(x, A[0]) if groups == 1 else x @ A.mT
    if any(tier.gain is not None for tier in tiers):
        gains = [x.new_ones(()) if tier.gain is None else tier.gain.to(x.dtype).unsqueeze(-1) for tier in tiers]
        shrunk = shrunk * torch.cat([g.expand(*x.shape[:-1], t.rank) for g, t in zip(gains, tiers, strict=True)], -1)
    return F.linear(shrunk, B[0]) if groups == 1 else shrunk @ B.mT


def choose(tier: Tier) -> tuple[Tensor, Tensor]:
    """The adapters that the groups use: `[G or 1, r, in]`, `[G or 1, width, r]`; B is zero where they use none, and
    both are beyond a slot's rank."""
    A, B, ranks = tier.A, tier.B, tier.ranks
    if tier.slot is not None:
        slot = tier.slot.to(A.device, torch.long)
        chosen = slot.clamp_min(0)
        A, B = A[chosen], B[chosen].where((slot >= 0)[:, None, None], 0)
        ranks = None if ranks is None else ranks[chosen]
    if ranks is not None:
        used = within(ranks, tier.rank)
        A, B = A.where(used[:, :, None], 0), B.where(used[:, None, :], 0)
    return A, B


def within(ranks: Tensor, most: int) -> Tensor:
    """Which of the `most` rows of A, columns of B, a slot's rank leaves in use: bool `[S, most]`."""
    return torch.arange(most, device=ranks.device) < ranks[:, None]
