"""Means that a few clients cannot move at will, of tensors and, for adapters, of products.

Every function takes all clients of a mean at once and counts them alike: how many images a client says that it has is a
claim of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hilora.algorithms.aggregation import as_adapter, check_floating
from hilora.errors import InvalidValueError


def product_distances(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`‖ΔW_i − ΔW_j‖²_F` of the products `ΔW = B A` of N clients, over all projections.

    From the factors alone: `⟨B_i A_i, B_j A_j⟩ = Σ_kl (b_ik · b_jl)(a_ik · a_jl)` over columns of B and rows of A.

    Args:
        factors: for each shape of projection, A `[N, ..., r, in]` and B `[N, ..., out, r]`.

    Returns:
        float64 `[N, N]`, symmetric, zero on the diagonal.
    """
    gram = 0
    for A, B in factors:
        check_floating(A, B)
        clients, r = len(A), A.shape[-2]
        rows = A.double().reshape(clients, -1, r, A.shape[-1])  # [N, P, r, in]
        columns = B.double().mT.reshape(clients, -1, r, B.shape[-2])  # [N, P, r, out]
        for a, b in zip(rows.unbind(1), columns.unbind(1), strict=True):
            a, b = a.flatten(0, 1), b.flatten(0, 1)
            gram = gram + ((a @ a.T) * (b @ b.T)).view(clients, r, clients, r).sum((1, 3))
    if not isinstance(gram, Tensor):
        raise InvalidValueError("got no projections to measure distances between")
    norms = gram.diagonal()
    return (norms[:, None] + norms - 2 * gram).clamp_min(0).fill_diagonal_(0)


def distances(tensors: Sequence[Tensor]) -> Tensor:
    """`‖x_i − x_j‖²` of the vectors that the tensors `[N, ...]` of N clients make up together: float64 `[N, N]`."""
    check_floating(*tensors)
    flat = torch.cat([tensor.double().reshape(len(tensor), -1) for tensor in tensors], 1)
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()


def clipping_scales(norms: Tensor, bound: float | None = None) -> Tensor:
    """What to multiply vectors of these norms `[N]` by, so that none is longer than a bound: at most 1, `[N]`.

    Args:
        norms: not negative.
        bound: by default the median of the norms, which fewer than half of the clients cannot move beyond those of
            the others.
    """
    limit = norms.quantile(0.5) if bound is None else torch.as_tensor(bound).to(norms)
    return torch.where(norms > limit, limit / norms, 1.0)


def geometric_median_weights(squared: Tensor, tolerance: float = 1e-10, steps: int = 1000) -> Tensor:
    """Weights of N points by which their mean is their geometric median, the point of the least sum of distances.

    Smoothed Weiszfeld (Pillutla et al., Robust Aggregation for Federated Learning, 2022), on the distances between the
    points alone: `‖x_i − Σ w_j x_j‖² = (D w)_i − wᵀ D w / 2`. Ours: the smoothing is relative, 1e-6 of the smallest
    median distance of a point from the others, and the start is near the points that have many others close by. So
    neither depends on how far away a minority is.

    Args:
        squared: squared distances `[N, N]`.
        tolerance: the end is where the weights change by less in sum.
        steps: at most so many.

    Returns:
        float64 `[N]`, not negative, of sum 1.
    """
    squared = squared.double()
    clients = len(squared)
    if clients < 3:  # any point between two is a median: take their mean
        return squared.new_full((clients,), 1 / clients)
    others = squared.masked_select(~torch.eye(clients, dtype=torch.bool, device=squared.device)).view(clients, -1)
    typical = others.median(1).values.sqrt()
    smoothing = (1e-6 * typical.min()).clamp_min(1e-100)
    weights = 1 / typical.clamp_min(smoothing)
    weights = weights / weights.sum()
    for _ in range(steps):
        reached = squared @ weights
        distance = (reached - weights @ reached / 2).clamp_min(0).sqrt().clamp_min(smoothing)
        new = 1 / distance
        new = new / new.sum()
        change = float((new - weights).abs().sum())
        weights = new
        if change < tolerance:
            break
    return weights


def trimmed_mean(values: Tensor, trim: float) -> Tensor:
    """The coordinate-wise trimmed mean (Yin et al., Byzantine-Robust Distributed Learning, 2018).

    In each coordinate the largest and the smallest `⌈trim · N⌉` values are left out, and the others averaged; at least
    one stays, or two, so that a `trim` of nearly ½ gives the coordinate-wise median.

    Args:
        values: `[N, ...]`; NaN counts as the largest.
        trim: share of the clients that is left out at either end, at least 0 and less than ½.

    Returns:
        `[...]` in the dtype of the values; the arithmetic is at least fp32.

    Raises:
        InvalidValueError: for another `trim`, no clients, or whole numbers.
    """
    check_floating(values)
    if not 0 <= trim < 0.5 or not len(values):
        raise InvalidValueError(f"trim={trim} of {len(values)} clients: expected at least 0 and less than 0.5, of some")
    clients = len(values)
    dropped = min(math.ceil(trim * clients - 1e-9), (clients - 1) // 2)
    dtype = torch.promote_types(values.dtype, torch.float32)
    kept = values.to(dtype).sort(0).values[dropped : clients - dropped]
    return kept.mean(0).to(values.dtype)


def trimmed_product_mean(A: Tensor, B: Tensor, trim: float, rank: int) -> tuple[Tensor, Tensor]:
    """The best adapter of a rank for the coordinate-wise trimmed mean of the clients' products.

    The products are formed, one projection at a time: order statistics of their entries cannot be had from factors.

    Args:
        A: `[N, ..., r, in]`.
        B: `[N, ..., out, r]`.
        trim: as of `trimmed_mean`.
        rank: of the result.

    Returns:
        A `[..., rank, in]` and B `[..., out, rank]` in the dtype of the input, as of `product_space_mean`.
    """
    check_floating(A, B)
    dtype = torch.promote_types(A.dtype, torch.float32)
    inner = A.shape[1:-2]
    adapters = []
    for a, b in zip(
        A.to(dtype).reshape(len(A), -1, *A.shape[-2:]).unbind(1),
        B.to(dtype).reshape(len(B), -1, *B.shape[-2:]).unbind(1),
        strict=True,
    ):
        adapters.append(as_adapter(*torch.linalg.svd(trimmed_mean(b @ a, trim), full_matrices=False), rank))
    new_A, new_B = (torch.stack(found).unflatten(0, inner or (1,)) for found in zip(*adapters, strict=True))
    if not inner:
        new_A, new_B = new_A[0], new_B[0]
    return new_A.to(A.dtype), new_B.to(B.dtype)
