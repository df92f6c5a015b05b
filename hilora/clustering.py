"""The third of the paper's inventions: groups of clients, found from the subspaces of their adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import kernels

Array = npt.NDArray[Any]
ROUNDING = 64  # distances of so many times the epsilon of their dtype are noise


@dataclass(frozen=True)
class Clustering:
    """Groups of N clients.

    Attributes:
        labels: int64 `[N]`, numbered from 0 in the order of their first client.
        k: number of groups, none of them empty.
        distances: `[N, N]`.
        eigengaps: `[N - 1]`; entry i is the gap of the spectrum after i + 1 eigenvalues, the evidence for K = i + 1.
        silhouettes: of the groups for K = 2, 3, …, where these chose K; else empty.
    """

    labels: Tensor
    k: int
    distances: Tensor
    eigengaps: Tensor
    silhouettes: Tensor = field(default_factory=lambda: torch.empty(0))


def ema_columns(mean: Tensor | None, B: Tensor, decay: float) -> Tensor:
    """The paper's moving average of the adapters themselves: `B̄ ← λ B̄ + (1 − λ) B / ‖B‖_F`, of shape `[..., out, r]`.

    It averages columns, and so depends on the basis that each round's aggregation happened to choose.
    """
    unit = _unit(B)
    return unit if mean is None else decay * mean + (1 - decay) * unit


def ema_subspace(mean: Tensor | None, change: Tensor, decay: float) -> Tensor:
    """A moving average of what a client changes in a round, that no choice of basis touches.

    Ours: the projectors' moments are averaged in place of the columns, `F Fᵀ ← λ F Fᵀ + (1 − λ) Δ Δᵀ` with
    `Δ = ΔB / ‖ΔB‖_F`, and F kept at rank r. With `decay` 0 it is the last round alone.

    Args:
        mean: F so far, `[..., out, r]`, or None.
        change: ΔB, a client's B after its local training minus the server's B before it, `[..., out, r]`.
        decay: λ.

    Returns:
        F `[..., out, r]`.
    """
    unit = _unit(change)
    if mean is None or decay == 0:
        return unit
    stacked = torch.cat([mean * decay**0.5, unit * (1 - decay) ** 0.5], -1)
    U, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
    leading: Tensor = (U * sigma.unsqueeze(-2))[..., : change.shape[-1]]
    return leading


def _unit(B: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(B, keepdim=True)
    return B / norm.clamp_min(torch.finfo(B.dtype).tiny)


def cluster_clients(U: Tensor, k_min: int, k_max: int) -> Clustering:
    """Spectral clustering of clients by the principal angles between their subspaces.

    Affinity `exp(−d² / 2σ²)` with σ the median distance; K the largest eigengap of the normalised Laplacian within
    `[k_min, k_max]`, the smallest K of equal ones. The groups depend neither on the bases chosen for the subspaces nor
    on the order of the clients; where clients cannot be told apart, a K that is asked for splits them at will.

    With `k_min` 1 the largest gap is always the trivial one. Ours: there K is the one whose groups stand out most, by
    their mean silhouette, and 1 if none do (0.1 was seen where clients have latent groups, below 0.01 where they have
    none; the threshold is 0.02 + 0.4 / N, since few clients stand apart by chance).

    Args:
        U: orthonormal bases `[N, P, out, r]`; zero columns where a rank is short.
        k_min: lowest K, at least 1.
        k_max: highest K; at most N are found.

    Raises:
        ValueError: for bounds that do not fit, or bases that are not finite.
    """
    clients = len(U)
    if U.dim() != 4 or clients == 0:
        raise ValueError(f"expected bases [N, P, out, r] of at least one client, got {tuple(U.shape)}")
    if not 1 <= k_min <= k_max:
        raise ValueError(f"need 1 <= k_min <= k_max, got {k_min} and {k_max}")
    if k_min > clients:
        raise ValueError(f"{clients} clients cannot form k_min = {k_min} clusters")
    if not U.isfinite().all():
        broken = [client for client, bases in enumerate(U) if not bases.isfinite().all()]
        raise ValueError(f"the bases of clients {broken} (positions in U) are not finite")
    distances = kernels.subspace_distances(U)
    dense = distances.double().cpu().numpy()
    eigenvalues, eigenvectors = _spectrum(dense, ROUNDING * torch.finfo(distances.dtype).eps)
    gaps = np.diff(eigenvalues)
    silhouettes = _silhouettes(dense, eigenvectors, min(k_max, clients - 1)) if k_min == 1 else np.zeros(0)
    if k_min > 1:
        k = _first_largest(gaps[k_min - 1 : k_max], k_min)
    else:
        k = _first_largest(silhouettes, 2) if silhouettes.max(initial=0) >= 0.02 + 0.4 / clients else 1
    labels = torch.from_numpy(_labels(eigenvectors[:, :k]))
    return Clustering(labels, int(labels.max()) + 1, distances, torch.from_numpy(gaps), torch.from_numpy(silhouettes))


def _spectrum(distances: Array, noise: float) -> tuple[Array, Array]:
    """Ascending eigenvalues `[N]` and eigenvectors `[N, N]` of the normalised Laplacian of the affinities."""
    from scipy.sparse.csgraph import laplacian

    others = distances[~np.eye(len(distances), dtype=bool)]
    differing = others[others > noise]
    sigma = np.median(others) if 2 * len(differing) > len(others) else np.median(differing) if len(differing) else 1.0
    affinity = np.exp(-((distances / sigma) ** 2) / 2)
    eigenvalues, eigenvectors = np.linalg.eigh(laplacian(affinity, normed=True))
    return eigenvalues, eigenvectors


def _first_largest(scores: Array, k_min: int) -> int:
    """K of the largest score, the first of equal ones (up to rounding); scores are those of K = k_min and up."""
    return k_min + int(np.argmax(scores >= scores.max() - 1e-9)) if len(scores) else k_min


def _silhouettes(distances: Array, eigenvectors: Array, k_max: int) -> Array:
    """For K = 2 to k_max: how much nearer clients are to their own group than to the next, on average."""
    return np.array([_silhouette(distances, _labels(eigenvectors[:, :k])) for k in range(2, k_max + 1)])


def _silhouette(distances: Array, labels: Array) -> float:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(distances, labels, metric="precomputed")) if labels.any() else 0.0


def _labels(vectors: Array) -> Array:
    """Groups from the first K eigenvectors `[N, K]`, by a pivoted QR factorisation, which needs no random start (Damle,
    Minden & Ying, Simple, direct and efficient multi-way spectral clustering, 2019)."""
    from scipy.linalg import qr

    pivots = qr(vectors.T, pivoting=True, mode="r")[-1][: vectors.shape[1]]
    left, _, right = np.linalg.svd(vectors[pivots].T)
    labels = np.abs(vectors @ left @ right).argmax(1)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def cluster_bases(U: Tensor, labels: Tensor) -> Tensor:
    """The subspace of each group: the leading directions of its members' mean projector.

    Args:
        U: bases `[N, P, out, r]`.
        labels: int64 `[N]`, all of 0 to K − 1.

    Returns:
        `[K, P, out, r]`.
    """
    rank = U.shape[-1]
    groups = [U[labels == group].movedim(0, -2).flatten(-2) for group in range(int(labels.max()) + 1)]
    return torch.stack([kernels.orthonormal_basis(members)[..., :rank] for members in groups])


def route_client(U: Tensor, U_clusters: Tensor) -> tuple[int, Tensor]:
    """The group whose subspace is nearest to a client's: `argmax_j mean cos²Θ(U, U_j)`, the first of equal ones.

    Args:
        U: the client's bases `[P, out, r]`.
        U_clusters: `[K, P, out, r]`.

    Returns:
        The group, and all similarities `[K]`, 1 for the same subspace and 0 for orthogonal ones.

    Raises:
        ValueError: for shapes that do not fit, bases that are not finite, or a client without any direction (all zero):
            it has not trained.
    """
    if U.dim() != 3 or U_clusters.dim() != 4 or U_clusters.shape[1:-1] != U.shape[:-1]:
        raise ValueError(
            f"bases {tuple(U.shape)} and {tuple(U_clusters.shape)}: expected [P, out, r] and [K, P, out, r]"
        )
    if not (U.isfinite().all() and U_clusters.isfinite().all()):
        raise ValueError("the bases are not finite")
    if not U.any():
        raise ValueError("the client's basis is zero: probe it by some local steps first")
    rank = min(U.shape[-1], U_clusters.shape[-1])
    similarities = (U_clusters.mT @ U).square().sum((-2, -1)).mean(-1) / rank
    return int(similarities.argmax()), similarities
