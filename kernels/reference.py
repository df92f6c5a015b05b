"""Every operation in plain PyTorch: the specification, and the path without a GPU.

Shapes: G groups of rows (one client each), M rows a group, S adapters (slots) in a tier's table, P projections, N
clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tier(NamedTuple):
    """One tier of low-rank adapters on a linear layer, `scale * B A`, as a table of S adapters.

    Attributes:
        A: `[S, r, in]`, how much to adapt.
        B: `[S, width, r]`, in which directions.
        scale: lora_alpha / r.
        slot: integer `[G]`, which of the S adapters each group of rows uses; -1 for none. Without it, all groups use
            the only adapter (S = 1), or group g uses adapter g (S = G). A table may be empty (S = 0): no effect.
        columns: `(start, width)` of the layer's output that the tier adds to; all of it by default.
    """

    A: Tensor
    B: Tensor
    scale: float
    slot: Tensor | None = None
    columns: tuple[int, int] | None = None


def stacked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float = 0.0
) -> Tensor:
    """`y = x Wᵀ + b + Σ_tier scale · (x A[slot]ᵀ) B[slot]ᵀ`, each tier on its columns of the output.

    Args:
        x: `[G, M, in]`, or `[..., in]` where no tier tells groups apart.
        weight: `[out, in]`.
        bias: `[out]` or None.
        tiers: adapters in any number and of any ranks. Their factors may be wider than `x` (fp32 beside bf16); the
            products are taken in the dtype of the base product.
        dropout: probability of dropping an element of the x that the adapters see.

    Returns:
        `[..., out]` in the dtype of the base product.

    Raises:
        ValueError: if shapes do not fit together.
        IndexError: if a slot lies outside of its table.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)} "
            "do not fit: expected [..., in], [out, in] and [out] or None"
        )
    for tier in tiers:
        _check(tier, x, weight)
    y = F.linear(x, weight, bias)
    by_columns: dict[tuple[int, int], list[Tier]] = {}
    for tier in tiers:
        if len(tier.A):
            by_columns.setdefault(tier.columns or (0, len(weight)), []).append(tier)
    if not by_columns:
        return y
    x = F.dropout(x.to(y.dtype), dropout) if dropout else x.to(y.dtype)
    pieces: list[Tensor] = []
    end = 0
    for (start, width), stacked in sorted(by_columns.items()):
        if start < end:
            y = y + _place(pieces, end, y)  # overlapping columns: start another sheet
            pieces, end = [], 0
        if start > end:
            pieces.append(y.new_zeros(1).expand(*y.shape[:-1], start - end))
        pieces.append(_low_rank(x, stacked))
        end = start + width
    return y + _place(pieces, end, y)


def _place(pieces: list[Tensor], end: int, y: Tensor) -> Tensor:
    if end < y.shape[-1]:
        pieces.append(y.new_zeros(1).expand(*y.shape[:-1], y.shape[-1] - end))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _low_rank(x: Tensor, tiers: list[Tier]) -> Tensor:
    """Tiers on the same columns are one product of their summed rank: `x [A1; A2]ᵀ [s1 B1, s2 B2]ᵀ`."""
    chosen = [_choose(tier, x.dtype) for tier in tiers]
    groups = max(len(A) for A, _ in chosen)
    A = torch.cat([A.expand(groups, -1, -1) for A, _ in chosen], dim=1)  # [G, R, in]
    B = torch.cat([B.expand(groups, -1, -1) for _, B in chosen], dim=2)  # [G, width, R]
    if groups == 1:
        return F.linear(F.linear(x, A[0]), B[0])
    return x @ A.mT @ B.mT


def _choose(tier: Tier, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The adapters that the groups use, scale included: `[G or 1, r, in]`, `[G or 1, width, r]`."""
    A, B = tier.A, tier.B
    if tier.slot is not None:
        slot = tier.slot.to(A.device, torch.long)
        present = (slot >= 0)[:, None, None]
        slot = slot.clamp_min(0)
        A, B = A[slot], B[slot].where(present, 0)
    return A.to(dtype), (B * tier.scale).to(dtype)


def _check(tier: Tier, x: Tensor, weight: Tensor) -> None:
    A, B, slot = tier.A, tier.B, tier.slot
    start, width = tier.columns or (0, len(weight))
    if A.dim() != 3 or B.dim() != 3 or B.shape != (len(A), width, A.shape[1]) or A.shape[2] != weight.shape[1]:
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit: expected A [S, r, {weight.shape[1]}] and "
            f"B [S, {width}, r] for a weight {tuple(weight.shape)} and {width} columns"
        )
    if start < 0 or start + width > len(weight):
        raise ValueError(f"columns (start {start}, width {width}) reach outside of the {len(weight)} outputs")
    if slot is not None and (slot.dim() != 1 or slot.dtype not in _INTEGERS):
        raise ValueError(f"slot must hold integers [G], got {slot.dtype} {tuple(slot.shape)}")
    if len(A) == 0 or (slot is None and len(A) == 1):
        return
    groups = len(A) if slot is None else len(slot)
    if x.dim() != 3 or len(x) != groups:
        raise ValueError(f"x {tuple(x.shape)} must be [G, M, in] with G = {groups}, as the tier's slots say")


_INTEGERS = (torch.int32, torch.int64)


def gram_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float], per_slot: bool = False) -> Tensor:
    """Orthogonality penalty `Σ_f γ_f Σ_P ‖B_fᵀ B‖²_F` of the tier in training against frozen ones (HiLoRA, the losses
    of the cluster and the leaf tier).

    Args:
        active: `[P, S, out, r]`.
        frozen: tensors `[P, S, out, r']`; where one side has S = 1, each of the other is paired with it.
        gammas: a weight for each of `frozen`.
        per_slot: return the S penalties instead of their sum.

    Returns:
        A scalar, or `[S]`; in fp32 also under autocast, or fp64 for fp64 factors.

    Raises:
        ValueError: if shapes do not fit together.
    """
    if len(frozen) != len(gammas):
        raise ValueError(f"{len(frozen)} frozen tiers need as many gammas, got {len(gammas)}")
    if active.dim() != 4:
        raise ValueError(f"expected active [P, S, out, r], got {tuple(active.shape)}")
    active = _at_least_fp32(active)
    total = active.new_zeros(active.shape[1])  # [S]
    for B, gamma in zip(frozen, gammas, strict=True):
        fits = B.dim() == 4 and B.shape[0] == active.shape[0] and B.shape[2] == active.shape[2]
        if not fits or (B.shape[1] != active.shape[1] and 1 not in (B.shape[1], active.shape[1])):
            raise ValueError(f"frozen {tuple(B.shape)} does not fit active {tuple(active.shape)}: [P, S or 1, out, r]")
        with _without_autocast(active):
            overlap = B.to(active.dtype).mT @ active  # [P, S, r', r]
        total = total + gamma * overlap.square().sum((0, 2, 3))
    return total if per_slot else total.sum()


def orthonormal_basis(B: Tensor) -> Tensor:
    """Orthonormal bases of column spaces, the columns ordered by singular value.

    Args:
        B: `[..., out, r]`, finite.

    Returns:
        The left singular vectors `[..., out, r]`, in fp32 or fp64; zero columns where the rank is short of r.
    """
    B = _at_least_fp32(B)
    U, sigma, _ = torch.linalg.svd(B, full_matrices=False)
    if U.shape[-1] < B.shape[-1]:
        U, sigma = F.pad(U, (0, B.shape[-1] - U.shape[-1])), F.pad(sigma, (0, B.shape[-1] - sigma.shape[-1]))
    tolerance = max(B.shape[-2:]) * torch.finfo(B.dtype).eps * sigma[..., :1]
    return torch.where(((sigma > tolerance) & (sigma > 0)).unsqueeze(-2), U, 0)


def subspace_distances(U: Tensor) -> Tensor:
    """Distances of subspaces by principal angles, `d_ij = 1 − ‖U_iᵀU_j‖²_F / r`, averaged over projections.

    0: the same subspace, 1: orthogonal ones. Directions that a rank-deficient basis lacks count as orthogonal.

    Args:
        U: orthonormal bases `[N, P, out, r]`.

    Returns:
        `[N, N]`, exactly symmetric with a zero diagonal, in fp32 (also under autocast) or fp64.

    Raises:
        ValueError: for another shape.
    """
    if U.dim() != 4:
        raise ValueError(f"expected bases [N, P, out, r], got {tuple(U.shape)}")
    U = _at_least_fp32(U)
    clients, projections, _, rank = U.shape
    similarity = U.new_zeros(clients, clients)
    for basis in U.unbind(1):  # [N, out, r]
        wide = basis.transpose(0, 1).reshape(basis.shape[1], -1)  # [out, N r]
        with _without_autocast(U):
            cosines = wide.T @ wide
        similarity += cosines.view(clients, rank, clients, rank).square().sum((1, 3))
    distances = (1 - similarity / (rank * projections)).clamp(0, 1)
    return ((distances + distances.T) / 2).fill_diagonal_(0)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
