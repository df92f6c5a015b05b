"""The stacked linear layer in plain PyTorch: the specification. G groups of M rows, S adapters in a tier's table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import exporting
from .tier import Tier


def stacked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float = 0.0
) -> Tensor:
    """As `stacked_linear.stacked_lora_linear`."""
    return plus_tiers(F.linear(x, weight, bias), x, tiers, dropout)


def plus_tiers(y: Tensor, x: Tensor, tiers: Sequence[Tier], dropout: float) -> Tensor:
    """What the tiers add to `y` `[..., out]`, the product with the base, of x `[..., in]`, and y itself."""
    for sheet in sheets(x.to(y.dtype), y.shape[-1], tiers, dropout):
        y = y + sheet
    return y


def sheets(x: Tensor, out: int, tiers: Sequence[Tier], dropout: float = 0.0) -> Iterator[Tensor]:
    """What the tiers add to the base product, `[..., out]`: one sheet, or several where columns overlap.

    Args:
        x: in the dtype of the base product.
        out: its width.
        tiers: as of `stacked_linear.stacked_lora_linear`.
        dropout: likewise.
    """
    by_columns: dict[tuple[int, int], list[Tier]] = {}
    for tier in tiers:
        if len(tier.A):
            by_columns.setdefault(tier.columns or (0, out), []).append(tier)
    if not by_columns:
        return
    x = F.dropout(x, dropout) if dropout else x
    pieces: list[Tensor] = []
    end = 0
    for start, width in sorted(by_columns):
        if start < end:
            yield _sheet(pieces, x, out - end)
            pieces, end = [], 0
        if start > end:
            pieces.append(_nothing(x, start - end))
        pieces.append(_low_rank(x, by_columns[start, width]))
        end = start + width
    yield _sheet(pieces, x, out - end)


def _sheet(pieces: list[Tensor], x: Tensor, missing: int) -> Tensor:
    if missing:
        pieces.append(_nothing(x, missing))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _nothing(x: Tensor, width: int) -> Tensor:
    return x.new_zeros(1).expand(*x.shape[:-1], width)


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


def choose(tier: Tier, picked: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Tensor]:
    """The adapters that the groups use: `[G or 1, r, in]`, `[G or 1, width, r]`; B is zero where they use none, and
    both are beyond a slot's rank, and B has the slot's own scale. `picked`: what `pick` says of the tier's slots, where
    that is known."""
    A, B, ranks, scales = tier.A, tier.B, tier.ranks, tier.slot_scales
    if tier.slot is not None:
        chosen, used = picked or pick(tier.slot.to(A.device))
        A, B = A[chosen], B[chosen]
        if used is not None:
            B = B.where(used[:, None, None], 0)
        ranks = None if ranks is None else ranks[chosen]
        scales = None if scales is None else scales[chosen]
    if scales is not None:
        B = (B * scales[:, None, None]).to(B.dtype)
    if ranks is not None:
        used = within(ranks, A.shape[1])
        A, B = A.where(used[:, :, None], 0), B.where(used[:, None, :], 0)
    return A, B


def pick(slot: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of a table that groups use, int64 `[G]`, and which of them use one; None: all do."""
    slot = slot.long()
    used = slot >= 0
    known = slot.is_cpu and not torch.compiler.is_compiling() and not exporting()
    return (slot, None) if known and bool(used.all()) else (slot.clamp_min(0), used)


def within(ranks: Tensor, most: int) -> Tensor:
    """Which of the `most` rows of A, columns of B, a slot's rank leaves in use: bool `[S, most]`."""
    return torch.arange(most, device=ranks.device) < ranks[:, None]
