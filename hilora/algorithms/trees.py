"""Trees of clients: who is merged with whom, and where such a tree is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hilora.algorithms.aggregation import check_floating
from hilora.algorithms.clustering import in_order, silhouette
from hilora.errors import InvalidValueError


class Cut(NamedTuple):
    """Groups of N clients.

    Attributes:
        labels: int64 `[N]`, numbered from 0 in the order of their first client.
        k: number of groups.
        score: what it was chosen by.
    """

    labels: Tensor
    k: int
    score: float


class Tree:
    """The agglomerative tree of N clients under average linkage, from which any number of groups can be cut: those of
    fewer groups are unions of those of more.

    Args:
        distances: `[N, N]`, symmetric, zero on the diagonal.

    Raises:
        InvalidValueError: for distances of another shape, or that are not finite.
    """

    def __init__(self, distances: Tensor) -> None:
        if distances.dim() != 2 or len(distances) != distances.shape[-1] or not len(distances):
            raise InvalidValueError(f"distances {tuple(distances.shape)}: expected [N, N] of at least one client")
        if not distances.isfinite().all():
            raise InvalidValueError("the distances are not finite")
        self.clients = len(distances)
        self.merges: npt.NDArray[Any] | None = None
        if self.clients > 1:
            from scipy.cluster.hierarchy import linkage
            from scipy.spatial.distance import squareform

            dense = distances.double().cpu().numpy()
            self.merges = linkage(squareform((dense + dense.T) / 2, checks=False), "average")

    def groups(self, k: int) -> Tensor:
        """The labels of k groups, int64 `[N]`."""
        if self.merges is None or k == 1:
            return torch.zeros(self.clients, dtype=torch.long)
        from scipy.cluster.hierarchy import cut_tree

        return torch.from_numpy(in_order(cut_tree(self.merges, n_clusters=k).ravel()).astype(np.int64))

    def best(self, sides: Sequence[int], distances: Tensor, of_one: float = 0.0) -> Cut:
        """The cut of the largest mean silhouette, the smallest number of groups of equal ones.

        Args:
            sides: numbers of groups to choose from, ascending, at least one.
            distances: `[N, N]`, that silhouettes are of; not necessarily those of the tree.
            of_one: what one group scores, which has no silhouette.
        """
        dense = distances.double().cpu().numpy()
        cuts = []
        for k in sides:
            labels = self.groups(k)
            cuts.append(Cut(labels, k, of_one if k == 1 else silhouette(dense, labels.numpy())))
        highest = max(cut.score for cut in cuts)
        return next(cut for cut in cuts if cut.score >= highest - 1e-9)


def cosine_distances(tensors: Sequence[Tensor]) -> Tensor:
    """`1 − cos` between the clients' matrices of each projection; a matrix of zeros is at 1 from all others.

    Args:
        tensors: for each shape of projection `[N, P, ...]`.

    Returns:
        float64 `[ΣP, N, N]`, zero on the diagonals.
    """
    found = []
    for tensor in tensors:
        check_floating(tensor)
        unit = F.normalize(tensor.double().flatten(2), dim=-1).transpose(0, 1)  # [P, N, ·]
        found.append((1 - unit @ unit.mT).clamp(0, 2))
    return _zero_diagonal(torch.cat(found))


def frobenius_distances(tensors: Sequence[Tensor]) -> Tensor:
    """The Frobenius norms of differences, likewise."""
    found = []
    for tensor in tensors:
        check_floating(tensor)
        flat = tensor.double().flatten(2).transpose(0, 1)
        found.append(torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist"))
    return _zero_diagonal(torch.cat(found))


def _zero_diagonal(distances: Tensor) -> Tensor:
    return distances * (1 - torch.eye(distances.shape[-1], dtype=distances.dtype, device=distances.device))
