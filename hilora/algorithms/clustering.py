"""The third of the paper's inventions: groups of clients, found from the subspaces of their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hilora import kernels
from hilora.algorithms.aggregation import check_floating
from hilora.errors import InvalidValueError

Array = npt.NDArray[Any]
ROUNDING = 64  # distances of so many times the epsilon of their dtype are noise
SHUFFLES = 99  # of the distances, to see what chance gives
_LADDER = [k for power in range(1, 20) for k in (2**power, 3 * 2 ** (power - 1))]  # 2, 3, 4, 6, 8, …: K to compare with


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
    `Δ = ΔB / ‖ΔB‖_F`, and F kept at the highest rank so far, zero columns aside. With `decay` 0 it is the last round.

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
    return _leading((U * sigma.unsqueeze(-2))[..., : change.shape[-1]], torch.maximum(_ranks(mean), _ranks(change)))


def _unit(B: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(B, keepdim=True)
    return B / norm.clamp_min(torch.finfo(B.dtype).tiny)


def cluster_clients(U: Tensor, k_min: int, k_max: int) -> Clustering:
    """Spectral clustering of clients by the principal angles between their subspaces.

    Affinity `exp(−d² / 2σ²)` with σ the median distance; K the largest eigengap of the normalised Laplacian within
    `[k_min, k_max]`, the smallest K of equal ones. The groups depend neither on the bases chosen for the subspaces nor
    on the order of the clients; where clients cannot be told apart, a K that is asked for splits them at will.

    With `k_min` 1 the largest gap is always the trivial one. Ours: there K is the one of the largest mean silhouette,
    and 1 where no K's groups stand out from chance. Both take the smallest distance off all distances: what a client's
    update has of its own noise is in every distance, and hides how they differ. Chance is the same distances dealt out
    to the pairs at random, 99 times: groups stand out if for some K their silhouette lies more standard deviations
    above its mean there than any did by chance. Fewer than six clients are too few to tell.

    Args:
        U: orthonormal bases `[N, P, out, r]`; zero columns where a rank is short.
        k_min: lowest K, at least 1.
        k_max: highest K; at most N are found.

    Raises:
        InvalidValueError: for bounds that do not fit, or bases that are not finite.
    """
    clients = len(U)
    if U.dim() != 4 or clients == 0:
        raise InvalidValueError(f"expected bases [N, P, out, r] of at least one client, got {tuple(U.shape)}")
    if not 1 <= k_min <= k_max:
        raise InvalidValueError(f"need 1 <= k_min <= k_max, got {k_min} and {k_max}")
    if k_min > clients:
        raise InvalidValueError(f"{clients} clients cannot form k_min = {k_min} clusters")
    check_floating(U)
    if not U.isfinite().all():
        broken = [client for client, bases in enumerate(U) if not bases.isfinite().all()]
        raise InvalidValueError(f"the bases of clients {broken} (positions in U) are not finite")
    distances = kernels.subspace_distances(U)
    dense = distances.double().cpu().numpy()
    noise = ROUNDING * torch.finfo(distances.dtype).eps
    eigenvalues, eigenvectors = _spectrum(dense, noise)
    gaps = np.diff(eigenvalues)
    silhouettes = np.zeros(0)
    if k_min > 1:
        k = _first_largest(gaps[k_min - 1 : k_max], k_min)
    else:
        silhouettes = _silhouettes(dense, eigenvectors, range(2, min(k_max, clients - 1) + 1))
        k = _first_largest(silhouettes, 2) if _stand_out(dense, silhouettes, noise) else 1
    labels = torch.from_numpy(_labels(eigenvectors[:, :k]))
    return Clustering(labels, int(labels.max()) + 1, distances, torch.from_numpy(gaps), torch.from_numpy(silhouettes))


def cluster_updates(updates: Tensor, k_min: int, k_max: int) -> Clustering:
    """K-means on clients' whole updates, which the paper compares its clustering with.

    Ours: K is the one of the largest mean silhouette within `[k_min, k_max]`, and 1, where that is allowed, if no
    groups stand out from chance (as in `cluster_clients`); ten starts from a fixed seed.

    Args:
        updates: `[N, ·]`, all that each client changed, or points that are as far apart.
        k_min: lowest K, at least 1.
        k_max: highest K; at most N − 1 are found.

    Returns:
        The groups, with Euclidean distances and without eigengaps.

    Raises:
        InvalidValueError: for bounds that do not fit, or updates that are not finite.
    """
    from sklearn.cluster import KMeans

    clients = len(updates)
    if not 1 <= k_min <= k_max or k_min > clients or not updates.isfinite().all():
        raise InvalidValueError(
            f"need finite updates and 1 <= k_min <= k_max, k_min <= {clients}; got {k_min} and {k_max}"
        )
    distances = torch.cdist(updates.double(), updates.double(), compute_mode="donot_use_mm_for_euclid_dist")
    sides = range(max(k_min, 2), min(k_max, clients - 1) + 1)
    found = [KMeans(k, n_init=10, random_state=0).fit_predict(updates.cpu().numpy()) for k in sides]
    dense = distances.cpu().numpy()
    silhouettes = np.array([silhouette(_above_least(dense), labels) for labels in found])
    k = _first_largest(silhouettes, sides[0]) if found else 1
    noise = ROUNDING * torch.finfo(updates.dtype).eps * float(distances.max())
    if k_min == 1 and k > 1:
        spectral = _silhouettes(dense, _spectrum(dense, noise)[1], sides)
        k = k if _stand_out(dense, spectral, noise) else 1
    labels = in_order(found[k - sides[0]]) if k > 1 else np.zeros(clients, np.int64)
    return Clustering(
        torch.from_numpy(labels), int(labels.max()) + 1, distances, torch.empty(0), torch.from_numpy(silhouettes)
    )


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


def _silhouettes(distances: Array, eigenvectors: Array, sides: Sequence[int]) -> Array:
    """For each K: how much nearer clients are to their own group than to the next, on average."""
    above = _above_least(distances)
    return np.array([silhouette(above, _labels(eigenvectors[:, :k])) for k in sides])


def _above_least(distances: Array) -> Array:
    """The distances less the smallest one between two clients."""
    others = ~np.eye(len(distances), dtype=bool)
    return np.where(others, distances - distances[others].min(initial=np.inf), 0.0)


def _stand_out(distances: Array, silhouettes: Array, noise: float) -> bool:
    """Whether the groups for some K have a silhouette that chance hardly gives.

    Args:
        distances: `[N, N]`.
        silhouettes: of the groups for K = 2, 3, ….
        noise: distances that are no more than this are rounding.
    """
    upper = np.triu_indices(len(distances), 1)
    values, rng = np.sort(distances[upper]), np.random.default_rng(0)  # sorted: the clients' order plays no part
    if not len(silhouettes) or values[-1] - values[0] <= noise:
        return False
    some = [k for k in _LADDER if k <= len(silhouettes) + 1]
    by_chance = np.empty((SHUFFLES, len(some)))
    for row in by_chance:
        dealt = np.zeros_like(distances)
        dealt[upper] = rng.permutation(values)
        dealt += dealt.T
        row[:] = _silhouettes(dealt, _spectrum(dealt, noise)[1], some)
    mean, std = by_chance.mean(0), by_chance.std(0) + 1e-9
    found = silhouettes[np.array(some) - 2]
    return bool(((found - mean) / std).max() > ((by_chance - mean) / std).max())


def silhouette(distances: Array, labels: Array) -> float:
    """The mean silhouette (Rousseeuw, 1987), as scikit-learn has it, but for five hundred groupings in a blink."""
    if not labels.any():
        return 0.0
    member = labels[:, None] == np.arange(labels.max() + 1)  # [N, K]
    sums, sizes = distances @ member, member.sum(0)
    own = sums[member] / np.maximum(sizes[labels] - 1, 1)
    next_best = np.where(member, np.inf, sums / sizes).min(1)
    larger = np.maximum(own, next_best)
    values = np.divide(next_best - own, larger, out=np.zeros_like(own), where=(larger > 0) & (sizes[labels] > 1))
    return float(values.mean())


def _labels(vectors: Array) -> Array:
    """Groups from the first K eigenvectors `[N, K]`, by a pivoted QR factorisation, which needs no random start (Damle,
    Minden & Ying, Simple, direct and efficient multi-way spectral clustering, 2019)."""
    from scipy.linalg import qr

    pivots = qr(vectors.T, pivoting=True, mode="r")[-1][: vectors.shape[1]]
    left, _, right = np.linalg.svd(vectors[pivots].T)
    return in_order(np.abs(vectors @ left @ right).argmax(1))


def in_order(labels: Array) -> Array:
    """The same groups, numbered from 0 in the order of their first client."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def cluster_bases(U: Tensor, labels: Tensor) -> Tensor:
    """The subspace of each group: the leading directions of its members' mean projector, as many as a member has.

    Args:
        U: bases `[N, P, out, r]`.
        labels: int64 `[N]`, all of 0 to K − 1.

    Returns:
        `[K, P, out, r]`.
    """
    groups = [U[labels == group] for group in range(int(labels.max()) + 1)]
    bases = [kernels.orthonormal_basis(own.movedim(0, -2).flatten(-2))[..., : U.shape[-1]] for own in groups]
    return torch.stack([_leading(basis, _ranks(own).amax(0)) for basis, own in zip(bases, groups, strict=True)])


def _leading(U: Tensor, ranks: Tensor) -> Tensor:
    """Of matrices `[..., out, r]` as many columns as `ranks` `[...]` says, and zeros in the place of the others."""
    return U.where(torch.arange(U.shape[-1], device=U.device) < ranks[..., None, None], 0)


def _ranks(U: Tensor) -> Tensor:
    """How many columns of bases `[..., out, r]` are not zero: `[...]`."""
    return U.ne(0).any(-2).sum(-1)


def route_client(U: Tensor, U_clusters: Tensor) -> tuple[int, Tensor]:
    """The group whose subspace is nearest to a client's: `argmax_j mean cos²Θ(U, U_j)`, the first of equal ones.
    Of bases of different ranks the smaller one has to lie in the other.

    Args:
        U: the client's bases `[P, out, r]`.
        U_clusters: `[K, P, out, r]`.

    Returns:
        The group, and all similarities `[K]`, 1 for the same subspace and 0 for orthogonal ones.

    Raises:
        InvalidValueError: for shapes that do not fit, bases that are not finite, or a client without any direction (all
            zero): it has not trained.
    """
    if U.dim() != 3 or U_clusters.dim() != 4 or U_clusters.shape[1:-1] != U.shape[:-1]:
        raise InvalidValueError(
            f"bases {tuple(U.shape)} and {tuple(U_clusters.shape)}: expected [P, out, r] and [K, P, out, r]"
        )
    if not (U.isfinite().all() and U_clusters.isfinite().all()):
        raise InvalidValueError("the bases are not finite")
    if not U.any():
        raise InvalidValueError("the client's basis is zero: probe it by some local steps first")
    ranks = torch.minimum(_ranks(U), _ranks(U_clusters)).clamp_min(1)
    similarities = ((U_clusters.mT @ U).square().sum((-2, -1)) / ranks).mean(-1)
    return int(similarities.argmax()), similarities
