"""Which cluster a client belongs to: what it trained of the root is remembered, clustered, and compared with."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hilora import kernels
from hilora.algorithms.clustering import (
    Clustering,
    cluster_bases,
    cluster_clients,
    cluster_updates,
    ema_columns,
    ema_subspace,
    route_client,
)
from hilora.federated.engine.state import State, factors, stream
from hilora.federated.settings import RunConfig

PUBLISHED_DECAY = 0.9  # λ
KEPT = ("member", "subspace", "left", "right", "trained_root", "groups", "centres")


class Grouping:
    """The clusters of N clients. Its attributes named in `KEPT` make up its state.

    `RunConfig.published` takes three steps as the paper writes them. As written they fail, so the default differs:

    - A client's subspace: published, the moving average (λ = 0.9) of its B over the root rounds. After an aggregation
      all clients start from one B, and its basis turns from round to round, so the average says little of a client.
      Default: the moving average of the subspace that it *changes* B in.
    - An unseen client: published, its probe's B against the clusters' B, which are orthogonal to the root's by design.
      Default: what its probe changes against the subspaces of the clusters' members.
    - No groups in the data: published, K is at least 2. Default: one cluster, unless groups stand out.

    Attributes:
        member: int64 `[N]`, the cluster of each client, -1 for none as yet.
        groups: the fields of a `Clustering` of the seen clients, once there is one.
    """

    def __init__(self, run: RunConfig, clients: int) -> None:
        self.run = run
        self.member = torch.full((clients,), -1)
        self.subspace: list[Tensor] = []  # for each bank, the clients' directions so far [N, P, out, r]
        self.left: list[Tensor] = []  # for k-means: left @ right is what a client's last round changed of B A,
        self.right: list[Tensor] = []  # for each bank [N, P, out, 2r] and [N, P, 2r, in]
        self.trained_root = torch.zeros(clients, dtype=torch.bool)
        self.groups: dict[str, Any] | None = None
        self.centres = torch.empty(0)  # bases of the clusters [K, P, out, r]

    def remember(self, clients: Tensor, trained: State, server: State) -> None:
        """Take in the adapters `[n, ...]` that clients trained from the server's `[1, ...]`."""
        if self.run.groups == "kmeans":
            self._keep_products(clients, trained, server)
        after, before = factors(trained), factors(server)
        if not self.subspace:
            self.subspace = [B.new_zeros(len(self.member), *B.shape[1:]) for _, B in after]
        new = ~self.trained_root[clients].view(-1, 1, 1, 1)
        for so_far, (_, B), (_, start) in zip(self.subspace, after, before, strict=True):
            if self.run.published:
                first, later = ema_columns(None, B, PUBLISHED_DECAY), ema_columns(so_far[clients], B, PUBLISHED_DECAY)
            else:
                change, decay = B - start, self.run.subspace_decay
                first, later = ema_subspace(None, change, decay), ema_subspace(so_far[clients], change, decay)
            so_far[clients] = first.where(new, later)
        self.trained_root[clients] = True

    def stale(self, seen: Tensor) -> Tensor:
        """Those of the clients that must be probed before they can be compared.

        Changes compare only where they are of the same root: where the clients did not all train in the same rounds,
        those that did are probed once more, from the root as it is now. Those that never did join by probing later.
        """
        started = self.trained_root[seen]
        if not started.any():
            return seen
        return seen[started] if self.run.participation < 1 and not self.run.published else seen[:0]

    def form(self, seen: Tensor, true_groups: Tensor | None) -> Tensor:
        """Cluster the clients that trained; returns the others, which have to be routed.

        Raises:
            ValueError: if none did, or true groups are asked for and there are none.
        """
        known = self.trained_root[seen]
        if not known.any():
            raise ValueError("no client has an image to train on")
        moved = self._bases(seen).flatten(1).any(1)
        known = known & moved if moved.any() else known  # a client that nothing moved has no subspace to compare
        sampled = seen[known]
        found = self._found(sampled, true_groups)
        self.member[sampled] = found.labels
        self.centres = cluster_bases(self._bases(sampled), found.labels)
        self.groups = asdict(found)
        return seen[~known]

    def _found(self, clients: Tensor, true_groups: Tensor | None) -> Clustering:
        low = max(2, self.run.k_min) if self.run.published else self.run.k_min
        most = min(self.run.k_max or max(10, len(clients) // 2), len(clients))
        if self.run.groups == "kmeans":
            values, vectors = torch.linalg.eigh(self._inner(clients, clients))
            places = vectors * values.clamp_min(0).sqrt()  # points that are as far apart as the changes
            return cluster_updates(places, min(low, most), most)
        found = cluster_clients(self._bases(clients), min(low, most), most)
        if self.run.groups == "random":
            order = torch.randperm(len(clients), generator=stream(self.run.seed, "random groups"))
            return replace(found, labels=found.labels[order])
        if self.run.groups == "true":
            if true_groups is None:
                raise ValueError("groups='true' needs a partition with true groups: sc-dir or domains")
            _, labels = true_groups[clients].unique(return_inverse=True)
            return replace(found, labels=labels, k=int(labels.max()) + 1)
        return found

    def with_all(self, seen: Tensor) -> None:
        """Note the clusters of all seen clients, once they are all routed."""
        if self.groups is not None and len(self.groups["labels"]) < len(seen):
            self.groups["labels"] = self.member[seen]
            self.groups["distances"] = kernels.subspace_distances(self._bases(seen))

    def join(self, probed: Tensor, targets: Tensor | None = None) -> None:
        """Route clients that were probed to the cluster nearest to what they trained.

        Args:
            targets: bases `[K, P, out, r]` to compare with, in place of those of the clusters' members.
        """
        if self.run.groups == "kmeans":
            self._join_nearest_mean(probed)
            return
        for client, basis in zip(probed, self._bases(probed) if len(probed) else (), strict=True):
            if basis.any():  # not so where the learning rate is zero
                self.member[client] = route_client(basis, self.centres if targets is None else targets)[0]

    def join_true(self, clients: Tensor, seen: Tensor, true_groups: Tensor) -> None:
        """Put clients where the members of their true group are."""
        for client in clients:
            same = seen[true_groups[seen] == true_groups[client]]
            if len(same):
                self.member[client] = self.member[same[0]]

    def _keep_products(self, clients: Tensor, trained: State, server: State) -> None:
        """Take in how clients changed the products. A and B are no measure: every aggregation turns their basis."""
        pairs = list(zip(factors(trained), factors(server), strict=True))
        left = [torch.cat([B, -start.expand_as(B)], -1) for (_, B), (_, start) in pairs]
        right = [torch.cat([A, start.expand_as(A)], -2) for (A, _), (start, _) in pairs]
        if not self.left:
            self.left = [one.new_zeros(len(self.member), *one.shape[1:]) for one in left]
            self.right = [one.new_zeros(len(self.member), *one.shape[1:]) for one in right]
        for table, rows in zip(self.left + self.right, left + right, strict=True):
            table[clients] = rows

    def _inner(self, these: Tensor, those: Tensor) -> Tensor:
        """Inner products of the changes of some clients and others, float64 `[n, m]`; no product is written out."""
        total = torch.zeros(len(these), len(those), dtype=torch.float64)
        for left, right in zip(self.left, self.right, strict=True):
            for row, client in zip(total, these, strict=True):
                outer = torch.einsum("poi,mpoj->mpij", left[client], left[those])
                row += (outer * torch.einsum("pia,mpja->mpij", right[client], right[those])).sum((1, 2, 3)).cpu()
        return total

    def _join_nearest_mean(self, probed: Tensor) -> None:
        """Route clients to the cluster whose members' mean change is nearest to their own."""
        known = self.trained_root & (self.member >= 0)
        known[probed] = False
        members = known.nonzero().squeeze(1)
        share = F.one_hot(self.member[members]).double()
        share /= share.sum(0)
        lengths = (share * (self._inner(members, members) @ share)).sum(0)
        self.member[probed] = (lengths - 2 * self._inner(probed, members) @ share).argmin(1)

    def _bases(self, clients: Tensor) -> Tensor:
        """Orthonormal bases `[n, P, out, r]` of what clients trained, over the projections of all banks."""
        return side_by_side([kernels.orthonormal_basis(value[clients]) for value in self.subspace])


def side_by_side(bases: list[Tensor]) -> Tensor:
    """The bases of all banks, `[n, P_i, out_i, r]`, as one `[n, ΣP_i, out, r]`. Padding by zeros turns no angle."""
    width = max(basis.shape[2] for basis in bases)
    return torch.cat([F.pad(basis, (0, 0, 0, width - basis.shape[2])) for basis in bases], 1)
