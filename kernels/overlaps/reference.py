"""Penalty, bases and distances in plain PyTorch: the specification. P projections, S slots, N clients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidValueError
from ..torch_internals import without_autocast


def gram_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float], per_slot: bool = False) -> Tensor:
    """As `overlaps.gram_penalty`."""
    active = at_least_fp32(active)
    total = active.new_zeros(active.shape[1])  # [S]
    for B, gamma in zip(frozen, gammas, strict=True):
        with without_autocast(active):
            overlap = B.to(active.dtype).mT @ active  # [P, S, r', r]
        total = total + gamma * overlap.square().sum((0, 2, 3))
    return total if per_slot else total.sum()


def check_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> None:
    """Raise an InvalidValueError unless all shapes fit together."""
    if len(frozen) != len(gammas):
        raise InvalidValueError(f"{len(frozen)} frozen tiers need as many gammas, got {len(gammas)}")
    if active.dim() != 4:
        raise InvalidValueError(f"expected active [P, S, out, r], got {tuple(active.shape)}")
    slots = active.shape[1]
    for B in frozen:
        fits = B.dim() == 4 and B.shape[0] == active.shape[0] and B.shape[2] == active.shape[2]
        if not fits or (B.shape[1] != slots and 1 not in (B.shape[1], slots)):
            raise InvalidValueError(
                f"frozen {tuple(B.shape)} does not fit active {tuple(active.shape)}: [P, S or 1, out, r]"
            )
        slots = max(slots, B.shape[1])


def orthonormal_basis(B: Tensor) -> Tensor:
    """As `overlaps.orthonormal_basis`."""
    B = at_least_fp32(B)
    U, sigma, _ = torch.linalg.svd(B, full_matrices=False)
    if U.shape[-1] < B.shape[-1]:
        U, sigma = F.pad(U, (0, B.shape[-1] - U.shape[-1])), F.pad(sigma, (0, B.shape[-1] - sigma.shape[-1]))
    tolerance = max(B.shape[-2:]) * torch.finfo(B.dtype).eps * sigma[..., :1]
    return torch.where(((sigma > tolerance) & (sigma > 0)).unsqueeze(-2), U, 0)


def subspace_distances(U: Tensor) -> Tensor:
    """As `overlaps.subspace_distances`."""
    U = at_least_fp32(U)
    clients, projections, _, columns = U.shape
    similarity = U.new_zeros(clients, clients)
    for basis, ranks in zip(U.unbind(1), ranks_of(U).unbind(1), strict=True):  # [N, out, r], [N]
        wide = basis.transpose(0, 1).reshape(basis.shape[1], -1)  # [out, N r]
        with without_autocast(U):
            cosines = wide.T @ wide
        smaller = torch.minimum(ranks[:, None], ranks).clamp_min(1)
        similarity += cosines.view(clients, columns, clients, columns).square().sum((1, 3)) * (columns / smaller)
    distances = (1 - similarity / (columns * projections)).clamp(0, 1)
    return ((distances + distances.T) / 2).fill_diagonal_(0)


def ranks_of(U: Tensor) -> Tensor:
    """How many columns of bases `[N, P, out, r]` are not zero: `[N, P]`, in their dtype."""
    return U.detach().ne(0).any(2).sum(2).to(U.dtype)


def check_bases(U: Tensor) -> None:
    """Raise an InvalidValueError unless they are `[N, P, out, r]`."""
    if U.dim() != 4:
        raise InvalidValueError(f"expected bases [N, P, out, r], got {tuple(U.shape)}")


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)
