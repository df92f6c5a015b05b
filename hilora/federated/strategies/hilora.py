"""HiLoRA (Peng et al., CVPR 2026): root, cluster and leaf adapters, trained in a cascade."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kernels
from ...aggregation import check_finite, product_space_mean, relative_change
from ...clustering import Clustering, cluster_bases, cluster_clients, ema_columns, ema_subspace, route_client
from ..state import Fit, Models, State, Table, Trained, mean, stream
from .base import Stage, Strategy
from .local import put


class HiLoRA(Strategy):
    """The cascade. `RunConfig.published` takes clustering and routing as the paper writes them, where the default differs:

    | | published | default |
    |---|---|---|
    | a client's subspace | moving average (λ = 0.9) of its B over the root rounds | moving average of what it *changes* in B in a round, as a subspace, so that neither the aggregate that all share nor its changing basis counts |
    | an unseen client | its probe B against the clusters' B | its probe's change against the subspaces of the clusters' members |
    | no groups in the data | K is at least 2 | one cluster, unless the groups stand out (`k_min` = 1) |
    """

    tiers = ("root", "cluster", "leaf")
    kept = ("stage", "root", "cluster", "leaf", "heads", "member", "subspace", "trained_root", "groups", "cluster_subspaces")

    def start(self, head: State) -> None:
        self.stage = "root"
        self.root = self.fresh("root", 1, stream(self.run.seed, 0))
        self.cluster: State = {}
        self.leaf: State = {}
        self.heads = {"root": head}
        self.member = torch.full((self.clients,), -1)  # the cluster of each client
        self.subspace: list[Tensor] = []  # for each bank, the clients' directions so far [N, P, out, r]
        self.trained_root = torch.zeros(self.clients, dtype=torch.bool)
        self.groups: dict[str, Any] | None = None  # the fields of a Clustering of the seen clients
        self.cluster_subspaces = torch.empty(0)  # [K, P, out, r]

    def stages(self) -> list[Stage]:
        return [Stage(tier, self.run.rounds[tier]) for tier in self.tiers]

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
            self.cluster = self.fresh("cluster", count, stream(self.run.seed, 1))
            self.heads["cluster"] = Table(self.heads["root"], torch.zeros(count, dtype=torch.long)).taken()
        elif tier == "leaf":
            self.leaf = self.fresh("leaf", self.clients, stream(self.run.seed, 2))
            self.heads["leaf"] = Table(self.heads["cluster"], self.member.clamp_min(0)).taken()
        self.stage = tier

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        check_finite(*trained.adapters.values(), *trained.head.values())
        if tier == "root":
            return self._aggregate_root(clients, trained)
        if tier == "leaf":
            put(self.leaf, clients, trained.adapters)
            put(self.heads["leaf"], clients, trained.head)
            return {}
        for group in self.member[clients].unique():
            members = self.member[clients] == group
            if trained.images[members].sum() > 0:
                adapters, head = _average(trained, members, self.run.rank[tier])
                put(self.cluster, group[None], adapters)
                put(self.heads["cluster"], group[None], head)
        return {}

    def _aggregate_root(self, clients: Tensor, trained: Trained) -> dict[str, Any]:
        worked = trained.images > 0
        if not worked.any():
            return {}
        self._remember(clients[worked], [B[worked] for B in _factors(trained.adapters, "B")])
        before = self.root
        self.root, self.heads["root"] = _average(trained, worked, self.run.rank["root"])
        if not any(B.any() for B in _factors(before, "B")):
            return {"rho": None}  # there was nothing before the first round
        rho = _change(self.root, before)
        return {"rho": rho, "stop": rho <= self.run.tau_rel}

    def _remember(self, clients: Tensor, B: list[Tensor]) -> None:
        """Take a round's B of the clients into their moving averages."""
        if not self.subspace:
            self.subspace = [value.new_zeros(self.clients, *value.shape[1:]) for value in B]
        new = ~self.trained_root[clients]
        for so_far, value, server in zip(self.subspace, B, _factors(self.root, "B"), strict=True):
            if self.run.published:
                first, later = (ema_columns(mean, value, PUBLISHED_DECAY) for mean in (None, so_far[clients]))
            else:
                change = value - server
                first, later = (
                    ema_subspace(mean, change, self.run.subspace_decay) for mean in (None, so_far[clients])
                )
            so_far[clients] = first.where(new.view(-1, 1, 1, 1), later)
        self.trained_root[clients] = True

    def _bases(self, clients: Tensor) -> Tensor:
        """Orthonormal bases `[n, P, out, r]` of what clients trained, over the projections of all banks."""
        return _side_by_side([kernels.orthonormal_basis(value[clients]) for value in self.subspace])

    def _probe(self, clients: Tensor, fit: Fit) -> Tensor:
        """Train the root for an epoch on clients that never did; returns those that had images to train on."""
        trained = fit(clients, self.models(clients), "root", 1)
        check_finite(*trained.adapters.values())
        worked = trained.images > 0
        if worked.any():
            self._remember(clients[worked], [B[worked] for B in _factors(trained.adapters, "B")])
        return clients[worked]

    def _form_clusters(self, seen: Tensor, fit: Fit) -> None:
        """Cluster the clients that trained the root; those that were never sampled join by probing."""
        if not self.trained_root[seen].any():
            self._probe(seen, fit)  # no root rounds at all: one epoch for everyone to go by
        sampled, missing = seen[self.trained_root[seen]], seen[~self.trained_root[seen]]
        if not len(sampled):
            raise ValueError("no client has an image to train on")
        low = max(2, self.run.k_min) if self.run.published else self.run.k_min
        most = min(self.run.k_max, len(sampled))
        found = cluster_clients(self._bases(sampled), min(low, most), most)
        self.member[sampled] = found.labels
        self.cluster_subspaces = cluster_bases(self._bases(sampled), found.labels)
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
        targets = self.cluster_subspaces
        if self.run.published and self.cluster:
            targets = _side_by_side([kernels.orthonormal_basis(B) for B in _factors(self.cluster, "B")])
        for client in probed:
            self.member[client] = route_client(self._bases(client[None])[0], targets)[0]

    def clustering(self) -> Clustering | None:
        return None if self.groups is None else Clustering(**self.groups)

    def tables(self) -> tuple[dict[str, State], dict[str, State]]:
        adapters = {"root": self.root, "cluster": self.cluster, "leaf": self.leaf}
        return {tier: state for tier, state in adapters.items() if state}, self.heads


PUBLISHED_DECAY = 0.9  # λ


def _side_by_side(bases: list[Tensor]) -> Tensor:
    """The bases of all banks `[n, P_i, out_i, r]` as one `[n, ΣP_i, out, r]`, padded to the widest: no angle changes."""
    width = max(basis.shape[2] for basis in bases)
    return torch.cat([F.pad(basis, (0, 0, 0, width - basis.shape[2])) for basis in bases], 1)


def _factors(state: State, factor: str) -> list[Tensor]:
    """A or B of every bank."""
    return [value for name, value in state.items() if name[0] == factor]


def _average(trained: Trained, members: Tensor, rank: int) -> tuple[State, State]:
    """Adapters averaged in product space, and heads, as one row."""
    adapters: State = {}
    for index in range(len(trained.adapters) // 2):
        A, B = trained.adapters[f"A{index}"][members], trained.adapters[f"B{index}"][members]
        A, B = product_space_mean(A, B, trained.images[members], rank)
        adapters[f"A{index}"], adapters[f"B{index}"] = A[None], B[None]
    return adapters, mean({name: value[members] for name, value in trained.head.items()}, trained.images[members])


def _change(after: State, before: State) -> float:
    """ρ over the projections of all banks, whose updates are laid end to end."""
    pairs = zip(_factors(after, "A"), _factors(after, "B"), _factors(before, "A"), _factors(before, "B"), strict=True)
    squares = torch.zeros(2, dtype=torch.float64)
    for A, B, A_before, B_before in pairs:
        norm = float((B_before.double() @ A_before.double()).norm())
        squares += torch.tensor([(relative_change(A, B, A_before, B_before) * norm) ** 2, norm**2])
    change, norm = squares.sqrt().tolist()
    return change / (norm + 1e-12)
