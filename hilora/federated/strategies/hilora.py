"""HiLoRA (Peng et al., CVPR 2026): root, cluster and leaf adapters, trained in a cascade."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kernels
from ...aggregation import product_space_mean, relative_change
from ...clustering import Clustering, cluster_bases, cluster_clients, ema_columns, ema_subspace, route_client
from ..state import Fit, Models, State, Table, Trained, mean, stream
from .base import Stage, Strategy
from .local import put


class HiLoRA(Strategy):
    """The cascade, with clusters found from what the clients' root adapters learn.

    `RunConfig.published` takes three steps as the paper writes them. As written they fail, so the default differs:

    - A client's subspace: published, the moving average (λ = 0.9) of its B over the root rounds. After an aggregation
      all clients start from one B, and its basis turns from round to round, so the average says little of a client.
      Default: the moving average of the subspace that it *changes* B in.
    - An unseen client: published, its probe's B against the clusters' B, which are orthogonal to the root's by design.
      Default: what its probe changes against the subspaces of the clusters' members.
    - No groups in the data: published, K is at least 2. Default: one cluster, unless groups stand out.
    """

    tiers = ("root", "cluster", "leaf")
    kept = (
        "stage",
        "root",
        "cluster",
        "leaf",
        "heads",
        "member",
        "subspace",
        "trained_root",
        "groups",
        "centres",
    )

    def start(self, head: State) -> None:
        self.stage = "root"
        self.root = self.fresh("root", 1, stream(self.run.seed, "fresh adapters", 0))
        self.cluster: State = {}
        self.leaf: State = {}
        self.heads = {"root": head}
        self.member = torch.full((self.clients,), -1)  # the cluster of each client
        self.subspace: list[Tensor] = []  # for each bank, the clients' directions so far [N, P, out, r]
        self.trained_root = torch.zeros(self.clients, dtype=torch.bool)
        self.groups: dict[str, Any] | None = None  # the fields of a Clustering of the seen clients
        self.centres = torch.empty(0)  # [K, P, out, r]

    def stages(self) -> list[Stage]:
        return [Stage(tier, self.run.rounds[tier], rates=tier) for tier in self.tiers]

    def models(self, clients: Tensor) -> Models:
        slots = {"root": torch.zeros(len(clients), dtype=torch.long), "cluster": self.member[clients], "leaf": clients}
        reached = self.tiers[: self.tiers.index(self.stage) + 1]
        tables = {"root": self.root, "cluster": self.cluster, "leaf": self.leaf}
        return Models(
            {tier: Table(tables[tier], slots[tier]) for tier in reached},
            Table(self.heads[self.stage], slots[self.stage]),
        )

    def begin(self, tier: str, seen: Tensor, fit: Fit) -> None:
        if tier == "cluster":
            self._form_clusters(seen, fit)
            count = int(self.member.max()) + 1
            self.cluster = self.fresh("cluster", count, stream(self.run.seed, "fresh adapters", 1))
            self.heads["cluster"] = Table(self.heads["root"], torch.zeros(count, dtype=torch.long)).taken()
        elif tier == "leaf":
            self.leaf = self.fresh("leaf", self.clients, stream(self.run.seed, "fresh adapters", 2))
            self.heads["leaf"] = Table(self.heads["cluster"], self.member.clamp_min(0)).taken()
        self.stage = tier

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        if tier == "root":
            return self._aggregate_root(clients, trained)
        if tier == "leaf":
            put(self.leaf, clients, trained.adapters)
            put(self.heads["leaf"], clients, trained.head)
            return {}
        for group in self.member[clients].unique():
            members = trained.rows(self.member[clients] == group)
            if members.images.sum() > 0:
                adapters, head = _average(members, self.run.rank[tier])
                put(self.cluster, group[None], adapters)
                put(self.heads["cluster"], group[None], head)
        return {}

    def _aggregate_root(self, clients: Tensor, trained: Trained) -> dict[str, Any]:
        worked = trained.images > 0
        if not worked.any():
            return {}
        clients, trained, before = clients[worked], trained.rows(worked), self.root
        self._remember(clients, trained)
        self.root, self.heads["root"] = _average(trained, self.run.rank["root"])
        if not any(B.any() for _, B in _factors(before)):
            return {"rho": None}  # there was nothing before the first round
        rho = relative_change(_factors(self.root), _factors(before))
        return {"rho": rho, "stop": rho <= self.run.tau_rel}

    def _remember(self, clients: Tensor, trained: Trained) -> None:
        """Take what clients trained of the root into the moving averages of their subspaces."""
        after, before = _factors(trained.adapters), _factors(self.root)
        if not self.subspace:
            self.subspace = [B.new_zeros(self.clients, *B.shape[1:]) for _, B in after]
        new = ~self.trained_root[clients].view(-1, 1, 1, 1)
        for so_far, (_, B), (_, server) in zip(self.subspace, after, before, strict=True):
            if self.run.published:
                first, later = ema_columns(None, B, PUBLISHED_DECAY), ema_columns(so_far[clients], B, PUBLISHED_DECAY)
            else:
                change, decay = B - server, self.run.subspace_decay
                first, later = ema_subspace(None, change, decay), ema_subspace(so_far[clients], change, decay)
            so_far[clients] = first.where(new, later)
        self.trained_root[clients] = True

    def _bases(self, clients: Tensor) -> Tensor:
        """Orthonormal bases `[n, P, out, r]` of what clients trained, over the projections of all banks."""
        return _side_by_side([kernels.orthonormal_basis(value[clients]) for value in self.subspace])

    def _probe(self, clients: Tensor, fit: Fit) -> Tensor:
        """Train the root for an epoch on clients that never did; returns those that had images to train on."""
        trained = fit(clients, self.models(clients), "root", 1)
        worked = trained.images > 0
        if worked.any():
            self._remember(clients[worked], trained.rows(worked))
        return clients[worked]

    def _form_clusters(self, seen: Tensor, fit: Fit) -> None:
        """Cluster the clients that trained the root; those that were never sampled join by probing.

        Changes compare only where they are of the same root. Where the clients did not all train in the same rounds,
        each is probed once more, from the root as it is now.
        """
        started = self.trained_root[seen].any()
        if not started or (self.run.participation < 1 and not self.run.published):
            sampled = seen[self.trained_root[seen]] if started else seen
            self.trained_root[sampled] = False
            self._probe(sampled, fit)
        known = self.trained_root[seen]
        if not known.any():
            raise ValueError("no client has an image to train on")
        moved = self._bases(seen).flatten(1).any(1)
        known = known & moved if moved.any() else known  # a client that nothing moved has no subspace to compare
        sampled, missing = seen[known], seen[~known]
        low = max(2, self.run.k_min) if self.run.published else self.run.k_min
        most = min(self.run.k_max or max(10, len(sampled) // 2), len(sampled))
        found = cluster_clients(self._bases(sampled), min(low, most), most)
        self.member[sampled] = found.labels
        self.centres = cluster_bases(self._bases(sampled), found.labels)
        if len(missing):
            self._route(missing, fit)
            found = replace(found, labels=self.member[seen], distances=kernels.subspace_distances(self._bases(seen)))
        self.groups = asdict(found)

    def admit(self, clients: Tensor, fit: Fit) -> None:
        stage, self.stage = self.stage, "root"  # a probe trains the root alone, as everyone did
        try:
            self._route(clients, fit)
        finally:
            self.stage = stage
        if self.stage == "leaf":
            put(self.heads["leaf"], clients, Table(self.heads["cluster"], self.member[clients]).taken())

    def _route(self, clients: Tensor, fit: Fit) -> None:
        """Join each client to the cluster that its probe points to; to the largest, if it has no image to probe."""
        self.member[clients] = self.member[self.member >= 0].mode().values
        probed = self._probe(clients, fit)
        targets = self.centres
        if self.run.published and self.cluster:
            targets = _side_by_side([kernels.orthonormal_basis(B) for _, B in _factors(self.cluster)])
        for client, basis in zip(probed, self._bases(probed) if len(probed) else (), strict=True):
            if basis.any():  # not so where the learning rate is zero
                self.member[client] = route_client(basis, targets)[0]

    def clustering(self) -> Clustering | None:
        return None if self.groups is None else Clustering(**self.groups)

    def joined(self, clients: Tensor) -> Tensor:
        return self.member[clients]

    def tables(self) -> tuple[dict[str, State], dict[str, State]]:
        adapters = {"root": self.root, "cluster": self.cluster, "leaf": self.leaf}
        return {tier: state for tier, state in adapters.items() if state}, self.heads


PUBLISHED_DECAY = 0.9  # λ


def _side_by_side(bases: list[Tensor]) -> Tensor:
    """The bases of all banks, `[n, P_i, out_i, r]`, as one `[n, ΣP_i, out, r]`. Padding by zeros turns no angle."""
    width = max(basis.shape[2] for basis in bases)
    return torch.cat([F.pad(basis, (0, 0, 0, width - basis.shape[2])) for basis in bases], 1)


def _factors(state: State) -> list[tuple[Tensor, Tensor]]:
    """A `[S, P, r, in]` and B `[S, P, out, r]` of every bank."""
    return [(state[f"A{i}"], state[f"B{i}"]) for i in range(len(state) // 2)]


def _average(trained: Trained, rank: int) -> tuple[State, State]:
    """Adapters averaged in product space, and heads, as one row."""
    adapters: State = {}
    for index, (A, B) in enumerate(_factors(trained.adapters)):
        A, B = product_space_mean(A, B, trained.images, rank)
        adapters |= {f"A{index}": A[None], f"B{index}": B[None]}
    return adapters, mean(trained.head, trained.images)
