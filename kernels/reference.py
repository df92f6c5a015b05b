"""Every operation in plain PyTorch: the specification, and the path without a GPU.

Shapes: G groups of rows (one client each), M rows a group, S adapters (slots) in a tier's table, P projections, N
clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .tier import Tier, check
from .torch_internals import without_autocast


def stacked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float = 0.0
) -> Tensor:
    """`y = x Wᵀ + b + Σ_tier scale · gain(x) · (x A[slot]ᵀ) B[slot]ᵀ`, each tier on its columns of the output.

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
        IndexError: if a slot lies outside of its table, on a CPU. On a GPU an error would have to wait for the device:
            there the outputs of that group, in the tier's columns at least, are NaN.
    """
    check(x, weight, bias, tiers)
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
    """The adapters that the groups use: `[G or 1, r, in]`, `[G or 1, width, r]`; B is zero where they use none."""
    if tier.slot is None:
        return tier.A, tier.B
    slot = tier.slot.to(tier.A.device, torch.long)
    chosen = slot.clamp_min(0)
    return tier.A[chosen], tier.B[chosen].where((slot >= 0)[:, None, None], 0)


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
    check_penalty(active, frozen, gammas)
    active = at_least_fp32(active)
    total = active.new_zeros(active.shape[1])  # [S]
    for B, gamma in zip(frozen, gammas, strict=True):
        with without_autocast(active):
            overlap = B.to(active.dtype).mT @ active  # [P, S, r', r]
        total = total + gamma * overlap.square().sum((0, 2, 3))
    return total if per_slot else total.sum()


def check_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> None:
    """Raise a ValueError unless all shapes fit together."""
    if len(frozen) != len(gammas):
        raise ValueError(f"{len(frozen)} frozen tiers need as many gammas, got {len(gammas)}")
    if active.dim() != 4:
        raise ValueError(f"expected active [P, S, out, r], got {tuple(active.shape)}")
    slots = active.shape[1]
    for B in frozen:
        fits = B.dim() == 4 and B.shape[0] == active.shape[0] and B.shape[2] == active.shape[2]
        if not fits or (B.shape[1] != slots and 1 not in (B.shape[1], slots)):
            raise ValueError(f"frozen {tuple(B.shape)} does not fit active {tuple(active.shape)}: [P, S or 1, out, r]")
        slots = max(slots, B.shape[1])


def orthonormal_basis(B: Tensor) -> Tensor:
    """Orthonormal bases of column spaces, the columns ordered by singular value.

    Args:
        B: `[..., out, r]`, finite.

    Returns:
        The left singular vectors `[..., out, r]`, in fp32 or fp64; zero columns where the rank is short of r.
    """
    B = at_least_fp32(B)
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
    U = at_least_fp32(U)
    clients, projections, _, rank = U.shape
    similarity = U.new_zeros(clients, clients)
    for basis in U.unbind(1):  # [N, out, r]
        wide = basis.transpose(0, 1).reshape(basis.shape[1], -1)  # [out, N r]
        with without_autocast(U):
            cosines = wide.T @ wide
        similarity += cosines.view(clients, rank, clients, rank).square().sum((1, 3))
    distances = (1 - similarity / (rank * projections)).clamp(0, 1)
    return ((distances + distances.T) / 2).fill_diagonal_(0)


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)
