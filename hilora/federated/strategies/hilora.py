"""HiLoRA (Peng et al., CVPR 2026): root, cluster and leaf adapters, trained in a cascade."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hilora import kernels
from hilora.algorithms.aggregation import product_space_mean, relative_change
from hilora.algorithms.clustering import Clustering
from hilora.federated.engine.state import Models, State, Table, Trained, factors, mean, one_for_all, put, size, stream
from hilora.federated.engine.work import Work
from hilora.federated.grouping import grouping
from hilora.federated.settings import RunConfig
from hilora.federated.strategies.base import Stage, Strategy, Traffic


class HiLoRA(Strategy):
    """The cascade, with clusters found from what the clients' root adapters learn (`grouping.Grouping`)."""

    tiers = ("root", "cluster", "leaf")
    kept = ("stage", "root", "cluster", "leaf", "heads", "seen", *grouping.KEPT)

    @classmethod
    def adapted(cls, run: RunConfig) -> RunConfig:
        own = {name: getattr(run, name) for name in ("gamma_root", "gamma_cluster", "head")}
        return replace(super().adapted(run), **own)

    def start(self, head: State) -> None:
        self.stage = "root"
        self.root = self.fresh("root", 1, stream(self.run.seed, "fresh adapters", 0))
        self.cluster: State = {}
        self.leaf: State = {}
        self.heads = {"root": head}
        self.seen = torch.empty(0, dtype=torch.long)
        self.grouping = grouping.Grouping(self.run, self.clients)

    def stages(self) -> list[Stage]:
        return [Stage(tier, self.run.rounds[tier], rates=tier) for tier in ("root", "cluster", "leaf")]

    def models(self, clients: Tensor) -> Models:
        reached = self.tiers[: self.tiers.index(self.stage) + 1]
        tables = {"root": self.root, "cluster": self.cluster, "leaf": self.leaf}
        slots = self._slots(clients)
        return Models(
            {tier: Table(tables[tier], slots[tier]) for tier in reached},
            Table(self.heads[self.stage], slots[self.stage]),
        )

    def _slots(self, clients: Tensor) -> dict[str, Tensor]:
        none = torch.zeros(len(clients), dtype=torch.long)
        return {"root": none, "cluster": self.grouping.member[clients], "leaf": clients}

    def begin(self, tier: str, seen: Tensor, work: Work) -> None:
        self.seen = seen
        member = self.grouping.member
        if tier == "cluster":
            self._form_clusters(seen, work)
            count = int(member.max()) + 1
            self.cluster = self.fresh("cluster", count, stream(self.run.seed, "fresh adapters", 1))
            self.heads["cluster"] = one_for_all(self.heads["root"], torch.arange(count)).taken()
        elif tier == "leaf":
            self.leaf = self.fresh("leaf", self.clients, stream(self.run.seed, "fresh adapters", 2))
            self.heads["leaf"] = Table(self.heads["cluster"], member.clamp_min(0)).taken()
        self.stage = tier

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        if tier == "root":
            return self._aggregate_root(clients, trained)
        if tier == "leaf":
            put(self.leaf, clients, trained.adapters)
            put(self.heads["leaf"], clients, trained.head)
            return {}
        member = self.grouping.member[clients]
        for group in member.unique():
            members = trained.rows(member == group)
            if members.images.sum() > 0:
                put(self.cluster, group[None], self._averaged(members))
                put(self.heads["cluster"], group[None], mean(members.head, members.images))
        return {}

    def _aggregate_root(self, clients: Tensor, trained: Trained) -> dict[str, Any]:
        worked = trained.images > 0
        if not worked.any():
            return {}
        clients, trained, before = clients[worked], trained.rows(worked), self.root
        self._remember(clients, trained)
        self.root, self.heads["root"] = self._averaged(trained), mean(trained.head, trained.images)
        if not any(B.any() for _, B in factors(before)):
            return {"rho": None}  # there was nothing before the first round
        rho = relative_change(factors(self.root), factors(before))
        return {"rho": rho, "stop": rho <= self.run.tau_rel}

    def _averaged(self, trained: Trained) -> State:
        """The mean of the clients' adapters as one row, taken of their products, or of A and B apart."""
        if self.run.aggregation == "factors":
            return mean(trained.adapters, trained.images)
        averaged: State = {}
        for index, (A, B) in enumerate(factors(trained.adapters)):
            A, B = product_space_mean(A, B, trained.images, A.shape[-2])
            averaged |= {f"A{index}": A[None], f"B{index}": B[None]}
        return averaged

    def _remember(self, clients: Tensor, trained: Trained) -> None:
        self.grouping.remember(clients, trained.adapters, self.root)

    def _probe(self, clients: Tensor, work: Work) -> Tensor:
        """Train the root for an epoch on clients; returns those that had images to train on."""
        trained = work.train(clients, self.models(clients), "root", epochs=1, factors=self.factors)
        worked = trained.images > 0
        if worked.any():
            self._remember(clients[worked], trained.rows(worked))
        return clients[worked]

    def _form_clusters(self, seen: Tensor, work: Work) -> None:
        stale = self.grouping.stale(seen)
        if len(stale):
            self.grouping.trained_root[stale] = False
            self._probe(stale, work)
        missing = self.grouping.form(seen, work.true_groups)
        if len(missing):
            self._route(missing, work)
            self.grouping.with_all(seen)

    def admit(self, clients: Tensor, work: Work) -> None:
        stage, self.stage = self.stage, "root"  # a probe trains the root alone, as everyone did
        try:
            self._route(clients, work)
        finally:
            self.stage = stage
        if self.stage == "leaf":
            put(self.heads["leaf"], clients, Table(self.heads["cluster"], self.grouping.member[clients]).taken())

    def _route(self, clients: Tensor, work: Work) -> None:
        """Join each client to the cluster that its probe points to; to the largest, if it has no image to probe."""
        member = self.grouping.member
        member[clients] = member[member >= 0].mode().values
        probed = self._probe(clients, work)
        published = self.run.published and any(B.any() for _, B in factors(self.cluster))
        targets = [kernels.orthonormal_basis(B) for _, B in factors(self.cluster)] if published else None
        self.grouping.join(probed, None if targets is None else grouping.side_by_side(targets))
        if self.run.groups == "true" and work.true_groups is not None:
            self.grouping.join_true(clients, self.seen, work.true_groups)

    def traffic(self, tier: str) -> Traffic:
        numbers = (
            0 if tier == "leaf" else size(self.root if tier == "root" else self.cluster) + size(self.heads["root"])
        )
        return Traffic(numbers, numbers)

    def clustering(self) -> Clustering | None:
        return None if self.grouping.groups is None else Clustering(**self.grouping.groups)

    def joined(self, clients: Tensor) -> Tensor:
        return self.grouping.member[clients]

    def tables(self) -> tuple[dict[str, State], dict[str, State]]:
        adapters = {"root": self.root, "cluster": self.cluster, "leaf": self.leaf}
        return {tier: state for tier, state in adapters.items() if state}, self.heads

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self.grouping if name in grouping.KEPT else self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in grouping.KEPT:
            setattr(self.grouping, name, state[name])
            delattr(self, name)
