"""Random clusters, as many and as large as the subspaces give: an ablation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hilora.algorithms.clustering import Clustering
from hilora.federated.grouping.subspace import SubspaceGrouping
from hilora.federated.streams import stream


class RandomGrouping(SubspaceGrouping):
    """The clusters of the subspaces, with the clients in another order."""

    def found(self, clients: Tensor) -> Clustering:
        found = super().found(clients)
        order = torch.randperm(len(clients), generator=stream(self.training.seed, "random groups"))
        return replace(found, labels=found.labels[order])
