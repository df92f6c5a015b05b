"""Clusters from the subspaces that clients change the root adapter in: the paper's, and the base of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from hilora import kernels
from hilora.adapters.table import AdapterTable
from hilora.algorithms.clustering import (
    Clustering,
    cluster_bases,
    cluster_clients,
    ema_columns,
    ema_subspace,
    route_client,
)
from hilora.errors import InvalidValueError
from hilora.federated.coverage import filled
from hilora.federated.settings import Number, Settings, TrainingSettings, Whole

PUBLISHED_DECAY = 0.9  # λ


class GroupingSettings(Settings):
    """How clusters come about."""

    groups: Literal["subspace", "kmeans", "random", "true"] = Field(
        "subspace",
        description="where clusters come from: subspaces; or, to compare, k-means on updates, chance, the truth",
    )
    k_min: Whole = Field(
        1, ge=1, description="lowest number of clusters; 1 lets the clustering find that there are no groups"
    )
    k_max: Whole | None = Field(
        None, ge=1, description="highest number of clusters; none: half as many as clients, at least 10"
    )
    subspace_decay: Number = Field(
        0.5, ge=0, lt=1, description="λ of the moving average of a client's subspace over the root rounds"
    )
    published: bool = Field(
        False, description="clustering and routing of the paper to the letter, in place of the forms that work"
    )

    @model_validator(mode="after")
    def _in_order(self) -> GroupingSettings:
        if self.k_max is not None and self.k_max < self.k_min:
            raise ValueError(f"k_max ({self.k_max}) is below k_min ({self.k_min})")
        return self


class SubspaceGrouping:
    """The clusters of N clients.

    `GroupingSettings.published` takes three steps as the paper writes them. As written they fail, so the default
    differs:

    - A client's subspace: published, the moving average (λ = 0.9) of its B over the root rounds. After an aggregation
      all clients start from one B, and its basis turns from round to round, so the average says little of a client.
      Default: the moving average of the subspace that it *changes* B in.
    - An unseen client: published, its probe's B against the clusters' B, which are orthogonal to the root's by design.
      Default: what its probe changes against the subspaces of the clusters' members.
    - No groups in the data: published, K is at least 2. Default: one cluster, unless groups stand out.

    Clients of unequal ranks are all probed with the leading ranks of the root that each of them holds, and compared by
    these: beside more ranks the leading ones move otherwise, and subspaces of more dimensions lie nearer to each other
    by chance, so that clusters would be of budgets.

    Attributes:
        member: int64 `[N]`, the cluster of each client, -1 for none as yet.
        groups: the fields of a `Clustering` of the seen clients, once there is one.
        kept: attributes that make up the state.
    """

    kept: ClassVar[tuple[str, ...]] = ("member", "subspace", "trained_root", "groups", "centres")

    def __init__(
        self,
        settings: GroupingSettings,
        run: TrainingSettings,
        clients: int,
        true_groups: Tensor | None = None,
        common: int | None = None,
    ) -> None:
        self.settings, self.training, self.true_groups, self.common = settings, run, true_groups, common
        self.member = torch.full((clients,), -1)
        self.subspace: list[Tensor] = []  # for each shape, the clients' directions so far [N, P, out, r]
        self.trained_root = torch.zeros(clients, dtype=torch.bool)
        self.groups: dict[str, Any] | None = None
        self.centres = torch.empty(0)  # bases of the clusters [K, P, out, r]

    def remember(self, clients: Tensor, trained: AdapterTable, server: AdapterTable) -> None:
        """Take in the adapters `[n, ...]` that clients trained from the server's `[1, ...]`."""
        trained, server = trained.first(self.common), server.first(self.common)
        whole = filled(trained, server)  # ranks that a client does not hold do not change
        if not self.subspace:
            self.subspace = [B.new_zeros(len(self.member), *B.shape[1:]) for B in trained.B]
        new = ~self.trained_root[clients].view(-1, 1, 1, 1)
        for so_far, B, after, start in zip(self.subspace, trained.B, whole.B, server.B, strict=True):
            if self.settings.published:
                first, later = ema_columns(None, B, PUBLISHED_DECAY), ema_columns(so_far[clients], B, PUBLISHED_DECAY)
            else:
                change, decay = after - start, self.settings.subspace_decay
                first, later = ema_subspace(None, change, decay), ema_subspace(so_far[clients], change, decay)
            so_far[clients] = first.where(new, later)
        self.trained_root[clients] = True

    def stale(self, seen: Tensor) -> Tensor:
        """Those of the clients that must be probed before they can be compared.

        Changes compare only where they are of the same root: where the clients did not all train in the same rounds,
        or all with the same ranks, those that did are probed once more, from the root as it is now. Those that never
        did join by probing later.
        """
        started = self.trained_root[seen]
        if not started.any():
            return seen
        alike = self.training.participation == 1 and self.common is None
        return seen[:0] if alike or self.settings.published else seen[started]

    def form(self, seen: Tensor) -> Tensor:
        """Cluster the clients that trained; returns the others, which have to be routed.

        Raises:
            InvalidValueError: if none did.
        """
        known = self.trained_root[seen]
        if not known.any():
            raise InvalidValueError("no client has an image to train on: give the seen clients some")
        moved = self.bases(seen).flatten(1).any(1)
        known = known & moved if moved.any() else known  # a client that nothing moved has no subspace to compare
        sampled = seen[known]
        found = self.found(sampled)
        self.member[sampled] = found.labels
        self.centres = cluster_bases(self.bases(sampled), found.labels)
        self.groups = asdict(found)
        return seen[~known]

    def found(self, clients: Tensor) -> Clustering:
        """The groups of clients."""
        return cluster_clients(self.bases(clients), *self.bounds(len(clients)))

    def bounds(self, clients: int) -> tuple[int, int]:
        """The lowest and the highest number of clusters of so many clients."""
        low = max(2, self.settings.k_min) if self.settings.published else self.settings.k_min
        most = min(self.settings.k_max or max(10, clients // 2), clients)
        return min(low, most), most

    def with_all(self, seen: Tensor) -> None:
        """Note the clusters of all seen clients, once they are all routed."""
        if self.groups is not None and len(self.groups["labels"]) < len(seen):
            self.groups["labels"] = self.member[seen]
            self.groups["distances"] = kernels.subspace_distances(self.bases(seen))

    def join(self, clients: Tensor, probed: Tensor, seen: Tensor, clusters: AdapterTable | None) -> None:
        """Route clients to the cluster nearest to what they trained.

        Args:
            clients: who join.
            probed: those of them that had images to train on.
            seen: those that take part in the training.
            clusters: the clusters' adapters, once there are any.
        """
        targets = self.centres
        if self.settings.published and clusters is not None and any(B.any() for B in clusters.B):
            targets = side_by_side([kernels.orthonormal_basis(B) for B in clusters.B])
        for client, basis in zip(probed, self.bases(probed) if len(probed) else (), strict=True):
            if basis.any():  # not so where the learning rate is zero
                self.member[client] = route_client(basis, targets)[0]

    def bases(self, clients: Tensor) -> Tensor:
        """Orthonormal bases `[n, P, out, r]` of what clients trained, over the projections of all shapes."""
        return side_by_side([kernels.orthonormal_basis(value[clients]) for value in self.subspace])

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.kept:
            setattr(self, name, state[name])


def side_by_side(bases: list[Tensor]) -> Tensor:
    """The bases of all shapes, `[n, P_i, out_i, r]`, as one `[n, ΣP_i, out, r]`. Padding by zeros turns no angle."""
    width = max(basis.shape[2] for basis in bases)
    return torch.cat([F.pad(basis, (0, 0, 0, width - basis.shape[2])) for basis in bases], 1)
