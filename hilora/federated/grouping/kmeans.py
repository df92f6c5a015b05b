"""Clusters by k-means on the whole of what clients changed: an ablation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.algorithms.clustering import Clustering, cluster_updates
from hilora.federated.grouping.subspace import SubspaceGrouping


class KMeansGrouping(SubspaceGrouping):
    """Clients are points that are as far apart as their last changes of the product B A. A and B themselves are no
    measure: every aggregation turns their basis."""

    kept: ClassVar[tuple[str, ...]] = (*SubspaceGrouping.kept, "left", "right")

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.left: list[Tensor] = []  # left @ right is what a client's last round changed of B A,
        self.right: list[Tensor] = []  # for each shape [N, P, out, 2r] and [N, P, 2r, in]

    def remember(self, clients: Tensor, trained: AdapterTable, server: AdapterTable) -> None:
        pairs = list(zip(trained.first(self.common).factors, server.first(self.common).factors, strict=True))
        left = [torch.cat([B, -start.expand_as(B)], -1) for (_, B), (_, start) in pairs]
        right = [torch.cat([A, start.expand_as(A)], -2) for (A, _), (start, _) in pairs]
        if not self.subspace:
            self.left = [one.new_zeros(len(self.member), *one.shape[1:]) for one in left]
            self.right = [one.new_zeros(len(self.member), *one.shape[1:]) for one in right]
        for table, rows in zip(self.left + self.right, left + right, strict=True):
            table[clients] = rows
        super().remember(clients, trained, server)

    def found(self, clients: Tensor) -> Clustering:
        values, vectors = torch.linalg.eigh(self._inner(clients, clients))
        return cluster_updates(vectors * values.clamp_min(0).sqrt(), *self.bounds(len(clients)))

    def join(self, clients: Tensor, probed: Tensor, seen: Tensor, clusters: AdapterTable | None) -> None:
        """To the cluster whose members' mean change is nearest to their own."""
        known = self.trained_root & (self.member >= 0)
        known[probed] = False
        members = known.nonzero().squeeze(1)
        share = F.one_hot(self.member[members]).double()
        share /= share.sum(0)
        lengths = (share * (self._inner(members, members) @ share)).sum(0)
        self.member[probed] = (lengths - 2 * self._inner(probed, members) @ share).argmin(1)

    def _inner(self, these: Tensor, those: Tensor) -> Tensor:
        """Inner products of the changes of some clients and others, float64 `[n, m]`; no product is written out."""
        total = torch.zeros(len(these), len(those), dtype=torch.float64)
        for left, right in zip(self.left, self.right, strict=True):
            for row, client in zip(total, these, strict=True):
                outer = torch.einsum("poi,mpoj->mpij", left[client], left[those])
                row += (outer * torch.einsum("pia,mpja->mpij", right[client], right[those])).sum((1, 2, 3)).cpu()
        return total
