"""The second of the paper's inventions: adapters averaged as products, not factor by factor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hilora.errors import InvalidValueError


def product_space_mean(A: Tensor, B: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best adapter of a rank for the mean of the clients' products (HiLoRA, root and cluster aggregation).

    `ΔW = Σ_i π_i B_i A_i` with `π = weights / Σ weights`, then `U Σ Vᵀ` its truncated SVD, `B := U`, `A := Σ Vᵀ`. ΔW is
    never formed: its factors are stacked, so that the SVD is of at most `N·r × N·r`.

    The norm of the result is all in A, whatever it was before: a step of a given size then turns B little and changes
    A much. Signs are fixed (the largest entry of each column of B is positive), so that the result does not depend on
    the solver's whim.

    Args:
        A: `[N, ..., r, in]`.
        B: `[N, ..., out, r]`.
        weights: `[N]`, not negative, such as the numbers of images.
        rank: of the result.

    Returns:
        A `[..., rank, in]` and B `[..., out, rank]` in the dtype of the input, the columns of B orthonormal (zero
        columns only where `rank` exceeds what N clients of rank r can span).

    Raises:
        InvalidValueError: for shapes that do not fit, weights that are negative, not finite or all zero, or an update
            that is not finite or no floating-point number; the message names the clients.
    """
    clients = len(A)
    if len(B) != clients or weights.shape != (clients,) or A.shape[1:-2] != B.shape[1:-2] or A.shape[-2] != B.shape[-1]:
        raise InvalidValueError(
            f"A {tuple(A.shape)}, B {tuple(B.shape)} and weights {tuple(weights.shape)} do not fit: expected "
            "[N, ..., r, in], [N, ..., out, r] and [N]"
        )
    check_floating(A, B)
    if rank < 1 or rank > min(A.shape[-1], B.shape[-2]):
        raise InvalidValueError(f"rank must lie between 1 and {min(A.shape[-1], B.shape[-2])}, got {rank}")
    if not ((weights >= 0) & weights.isfinite()).all() or not weights.any():
        raise InvalidValueError(f"weights must be finite, not negative and not all zero, got {weights.tolist()}")
    check_finite(A, B)
    dtype = torch.promote_types(A.dtype, torch.float32)
    share = (weights.to(A.device, dtype) / weights.sum()).view(-1, *[1] * (A.dim() - 1))
    tall_B = (B.to(dtype) * share).movedim(0, -2).flatten(-2)  # [..., out, N r]
    tall_A = A.to(dtype).movedim(0, -3).flatten(-3, -2).mT  # [..., in, N r]
    Q_B, R_B = torch.linalg.qr(tall_B)
    Q_A, R_A = torch.linalg.qr(tall_A)
    core = R_B @ R_A.mT
    if not core.isfinite().all():
        raise InvalidValueError(f"the products of the clients' updates overflow {dtype}: scale A or B down")
    U, sigma, Vh = torch.linalg.svd(core, full_matrices=False)
    new_A, new_B = as_adapter(Q_B @ U, sigma, Vh @ Q_A.mT, rank)
    return new_A.to(A.dtype), new_B.to(B.dtype)


def as_adapter(U: Tensor, sigma: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best adapter of a rank for a product `U Σ Vᵀ`, from its SVD: `B := U`, `A := Σ Vᵀ`, signs as in
    `product_space_mean`, zeros where there are fewer singular values than `rank`."""
    U, sigma, V = U[..., :rank], sigma[..., :rank], Vh[..., :rank, :].mT
    sign = U.gather(-2, U.abs().argmax(-2, keepdim=True)).sign()  # [..., 1, rank]
    U, V = U * sign, V * sign
    missing = rank - U.shape[-1]
    return F.pad((V * sigma.unsqueeze(-2)).mT, (0, 0, 0, missing)), F.pad(U, (0, missing))


def check_floating(*tensors: Tensor) -> None:
    """Raise an InvalidValueError unless tensors have a floating dtype."""
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise InvalidValueError(f"got a tensor of {tensor.dtype}, expected floating-point numbers")


def check_finite(*stacked: Tensor) -> None:
    """Raise an InvalidValueError that names the clients with an update that is not finite, for tensors `[N, ...]`."""
    good = torch.stack([value[:, None].isfinite().flatten(1).all(1) for value in stacked]).all(0)
    if not good.all():
        raise InvalidValueError(
            f"the updates of clients {(~good).nonzero().flatten().tolist()} (positions in the batch) are not finite: "
            "lower the learning rate, or leave these clients out"
        )


def relative_change(
    after: Sequence[tuple[Tensor, Tensor]], before: Sequence[tuple[Tensor, Tensor]], eps: float = 1e-12
) -> float:
    """`ρ = ‖ΔW − ΔW_before‖_F / (‖ΔW_before‖_F + ε)` over all projections: the root tier stops when it is small.

    Args:
        after: for each shape of projection, A `[..., r, in]` and B `[..., out, r]`; `before` alike, of any ranks.
        eps: ε.
    """
    change = norm = 0.0
    for (A, B), (A_before, B_before) in zip(after, before, strict=True):
        change += _squared_norm(torch.cat([A, A_before], -2), torch.cat([B, -B_before], -1))
        norm += _squared_norm(A_before, B_before)
    return math.sqrt(change) / (math.sqrt(norm) + eps)


def product_norms(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`‖B A‖_F` of each of N adapters over all projections, float64 `[N]`.

    Args:
        factors: for each shape of projection, A `[N, ..., r, in]` and B `[N, ..., out, r]`.
    """
    squares = []
    for A, B in factors:
        A, B = A.double(), B.double()
        squares.append(((B.mT @ B) * (A @ A.mT)).flatten(1).sum(1).clamp_min(0))
    return torch.stack(squares).sum(0).sqrt()


def _squared_norm(A: Tensor, B: Tensor) -> float:
    """`‖B A‖²_F = tr(BᵀB · AAᵀ)`, without the product."""
    A, B = A.double(), B.double()
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0))
