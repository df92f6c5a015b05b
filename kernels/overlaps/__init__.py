"""Overlaps of adapters' column spaces: the orthogonality penalty, bases, and distances of clients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Implementation, Operation
from ..torch_internals import without_autocast
from . import folded, reference

__all__ = ["OPERATIONS", "gram_penalty", "orthonormal_basis", "subspace_distances"]

MAX_RANK = 64  # of kernels: their Gram matrices stay in registers


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
        InvalidValueError: if shapes do not fit together.
    """
    return _PENALTY(active, frozen, gammas, per_slot)


def orthonormal_basis(B: Tensor) -> Tensor:
    """Orthonormal bases of column spaces, the columns ordered by singular value.

    Args:
        B: `[..., out, r]`, finite.

    Returns:
        The left singular vectors `[..., out, r]`, in fp32 or fp64; zero columns where the rank is short of r.
    """
    return _BASIS(B)


def subspace_distances(U: Tensor) -> Tensor:
    """Distances of subspaces by principal angles, `d_ij = 1 − ‖U_iᵀU_j‖²_F / r`, averaged over projections.

    0: the same subspace, 1: orthogonal ones. Where bases lack directions (zero columns), r is the smaller of the two
    ranks, for each projection, and a subspace within another is at distance 0; else clients would be apart by rank. A
    basis without directions is at distance 1 from all others.

    Args:
        U: orthonormal bases `[N, P, out, r]`, filled with zero columns where their rank is smaller.

    Returns:
        `[N, N]`, exactly symmetric with a zero diagonal, in fp32 (also under autocast) or fp64.

    Raises:
        InvalidValueError: for another shape.
    """
    return _DISTANCES(U)


Penalty = tuple[Tensor, list[Tensor], list[float], bool]


def _prepare_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float], per_slot: bool) -> Penalty:
    reference.check_penalty(active, frozen, gammas)
    return active, list(frozen), list(gammas), per_slot


def _cannot_penalty(active: Tensor, frozen: list[Tensor], gammas: list[float], per_slot: bool) -> str:
    """Why the reference alone takes a call."""
    if not frozen or not all(B.numel() for B in (active, *frozen)):
        return "there is nothing to compare"
    in_training = torch.is_grad_enabled() and any(B.requires_grad for B in frozen)
    return "gradients of frozen tiers are the reference's" if in_training else ""


def _kernels_cannot_penalty(active: Tensor, frozen: list[Tensor], gammas: list[float], per_slot: bool) -> str:
    why = _cannot_penalty(active, frozen, gammas, per_slot)
    if not why and max(B.shape[3] for B in (active, *frozen)) > MAX_RANK:
        why = f"kernels have ranks up to {MAX_RANK}"
    return why


def _fold_penalty(active: Tensor, frozen: list[Tensor], gammas: list[float], per_slot: bool) -> Tensor:
    active = reference.at_least_fp32(active)
    with without_autocast(active):
        penalties = folded.gram_penalty(active, [B.to(active.dtype) for B in frozen], gammas)
    return penalties if per_slot else penalties.sum()


def _kernel_penalty(active: Tensor, frozen: list[Tensor], gammas: list[float], per_slot: bool) -> Tensor:
    from . import operator  # which imports Triton

    penalties: Tensor = operator.gram_penalty(active, frozen, gammas)[0]
    return penalties if per_slot else penalties.sum()


def _prepare_distances(U: Tensor) -> tuple[Tensor]:
    reference.check_bases(U)
    return (U,)


def _kernels_cannot_distances(U: Tensor) -> str:
    if U.shape[3] > MAX_RANK:
        return f"kernels have ranks up to {MAX_RANK}"
    if not U.numel():
        return "there is nothing to compare"
    return "gradients of distances are the reference's" if torch.is_grad_enabled() and U.requires_grad else ""


def _kernel_distances(U: Tensor) -> Tensor:
    from . import operator

    distances: Tensor = operator.subspace_distances(U.float())
    return distances


_KERNEL_PENALTY = Implementation(_kernel_penalty, _kernels_cannot_penalty)
_KERNEL_DISTANCES = Implementation(_kernel_distances, _kernels_cannot_distances)
_PENALTY = Operation(
    gram_penalty,
    reference.gram_penalty,
    {
        "fused": _KERNEL_PENALTY,
        "split": _KERNEL_PENALTY,
        "folded": Implementation(_fold_penalty, _cannot_penalty),
    },
    _prepare_penalty,
)
_BASIS = Operation(orthonormal_basis, reference.orthonormal_basis, {})
_DISTANCES = Operation(
    subspace_distances,
    reference.subspace_distances,
    {"fused": _KERNEL_DISTANCES, "split": _KERNEL_DISTANCES},
    _prepare_distances,
)
OPERATIONS = (_PENALTY, _BASIS, _DISTANCES)
