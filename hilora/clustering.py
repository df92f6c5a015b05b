"""The third of the paper's inventions: groups of clients, found from the subspaces of their adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import kernels


Array = npt.NDArray[Any]
SILHOUETTE = 0.02  # below it, groups do not stand out


@dataclass(frozen=True)
class Clustering:
    """Groups of N clients.

    Attributes:
        labels: int64 `[N]`, numbered from 0 in the order of their first client.
        k: number of groups.
        distances: `[N, N]`.
        eigengaps: `[N - 1]`; entry i is the gap of the spectrum after i + 1 eigenvalues, the evidence for K = i + 1.
    """

    labels: Tensor
    k: int
    distances: Tensor
    eigengaps: Tensor


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
    rank = change.shape[-1]
    return U[..., :rank] * sigma[..., None, :rank]


def _unit(B: Tensor) -> Tensor:
    return B / B.flatten(-2).norm(dim=-1).clamp_min(torch.finfo(B.dtype).tiny)[..., None, None]


def cluster_clients(U: Tensor, k_min: int, k_max: int) -> Clustering:
    """Spectral clustering of clients by the principal angles between their subspaces.

    Affinity `exp(−d² / 2σ²)` with σ the median distance; K the largest eigengap of the normalised Laplacian within
    `[k_min, k_max]`, the smallest K of equal ones. The groups depend neither on the bases chosen for the subspaces nor
    on the order of the clients.

    By that rule K = 1 would always win. Ours: with `k_min` 1 the best K from 2 on is taken, unless its groups do not
    stand out (a mean silhouette below 0.02; 0.10 was seen where clients have latent groups, 0.01 where they have none).

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
        raise ValueError("the bases are not finite")
    distances = kernels.subspace_distances(U)
    affinity, eigenvalues = _spectrum(distances.double().cpu().numpy())
    gaps = np.diff(eigenvalues)
    k = _largest_gap(gaps, max(k_min, 2), min(k_max, clients))
    labels = _spectral_labels(affinity, k)
    if k_min == 1 and not _stand_out(distances, labels, k):
        k, labels = 1, np.zeros_like(labels)
    return Clustering(torch.from_numpy(labels), k, distances, torch.from_numpy(gaps))


def _spectrum(distances: Array) -> tuple[Array, Array]:
    """Affinity, and the ascending eigenvalues of its normalised Laplacian."""
    from scipy.sparse.csgraph import laplacian

    off_diagonal = distances[~np.eye(len(distances), dtype=bool)]
    sigma = np.median(off_diagonal) if len(off_diagonal) else 0.0
    if sigma == 0:
        sigma = off_diagonal.max(initial=0) or 1.0
    affinity = np.exp(-((distances / sigma) ** 2) / 2)
    return affinity, np.linalg.eigvalsh(laplacian(affinity, normed=True))


def _largest_gap(gaps: Array, k_min: int, k_max: int) -> int:
    """K with the largest gap after it; of equal gaps (up to rounding) the first."""
    window = gaps[k_min - 1 : k_max]
    return k_min + int(np.argmax(window >= window.max() - 1e-9)) if len(window) else min(k_min, k_max)


def _stand_out(distances: Tensor, labels: Array, k: int) -> bool:
    """Whether members of a group are nearer to each other than to the next group, as far as distances go."""
    from sklearn.metrics import silhouette_score

    if not 2 <= k < len(labels):
        return False
    return bool(silhouette_score(distances.cpu().numpy(), labels, metric="precomputed") >= SILHOUETTE)


def _spectral_labels(affinity: Array, k: int) -> Array:
    from sklearn.cluster import SpectralClustering

    clients = len(affinity)
    if k == 1 or k == clients:
        return np.zeros(clients, np.int64) if k == 1 else np.arange(clients)
    model = SpectralClustering(k, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    labels = model.fit_predict(affinity)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


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
        ValueError: for shapes that do not fit, or a client without any direction (all zero): it has not trained.
    """
    if U.dim() != 3 or U_clusters.dim() != 4 or U_clusters.shape[1:-1] != U.shape[:-1]:
        raise ValueError(f"bases {tuple(U.shape)} and {tuple(U_clusters.shape)}: expected [P, out, r] and [K, P, out, r]")
    if not U.any():
        raise ValueError("the client's basis is zero: probe it by some local steps first")
    rank = min(U.shape[-1], U_clusters.shape[-1])
    similarities = (U_clusters.mT @ U).square().sum((-2, -1)).mean(-1) / rank
    return int(similarities.argmax()), similarities
