"""Clusters as an oracle knows them: the true groups of the partition."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.algorithms.clustering import Clustering
from hilora.errors import InvalidValueError
from hilora.federated.grouping.subspace import SubspaceGrouping


class OracleGrouping(SubspaceGrouping):
    """A cluster for each true group of the clients that trained."""

    def stale(self, seen: Tensor) -> Tensor:
        """None, once some have trained: nobody has to be compared with anybody."""
        return seen[:0] if self.trained_root[seen].any() else seen

    def found(self, clients: Tensor) -> Clustering:
        found = super().found(clients)
        if self.true_groups is None:
            raise InvalidValueError("groups='true' needs a partition that has true groups, such as sc-dir or domains")
        _, labels = self.true_groups[clients].unique(return_inverse=True)
        return replace(found, labels=labels, k=int(labels.max()) + 1)

    def join(self, clients: Tensor, probed: Tensor, seen: Tensor, clusters: AdapterTable | None) -> None:
        """To where the members of their true group are, if there are any."""
        super().join(clients, probed, seen, clusters)
        if self.true_groups is None:
            return
        there = seen[~torch.isin(seen, clients)]
        for client in clients:
            same = there[self.true_groups[there] == self.true_groups[client]]
            if len(same):
                self.member[client] = self.member[same[0]]
