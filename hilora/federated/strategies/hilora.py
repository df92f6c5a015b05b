"""HiLoRA (Peng et al., CVPR 2026): root, cluster and leaf adapters, trained in a cascade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.algorithms.aggregation import product_space_mean, relative_change
from hilora.algorithms.clustering import Clustering
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.grouping import GROUPINGS, GroupingSettings
from hilora.federated.protocol import Download, Rows, Stage, Upload, shared
from hilora.federated.settings import Number
from hilora.federated.strategies.base import Ask, Strategy
from hilora.federated.streams import stream

PROBE = Stage("root", 0, "root", "probe")


class HiLoRA(Strategy):
    """The cascade, with clusters found from what the clients' root adapters learn (`hilora.federated.grouping`).

    All clients train the root; the server averages products (`algorithms.aggregation`). Then each group trains its
    cluster adapter on top of the frozen root, and in the end each client its leaf, which never leaves it. The head
    follows the tier in training: averaged over all, inside of the group, then private.
    """

    class Settings(GroupingSettings):
        gamma_root: Number = Field(
            0.1, ge=0, description="weight of a later tier's overlap with the root (the paper's γ_c)"
        )
        gamma_cluster: Number = Field(0.1, ge=0, description="weight of the leaf's overlap with the cluster tier (γ_l)")
        tau_rel: Number = Field(
            0.01, ge=0, description="the root stops when the aggregate's relative change ρ falls to it"
        )
        aggregation: Literal["product", "factors"] = Field(
            "product", description="average the products B A, or A and B apart"
        )
        head: Literal["follow", "global"] = Field(
            "follow", description="the head follows the tier in training, or is trained with the root and then frozen"
        )

    name = "hilora"
    tiers = ("root", "cluster", "leaf")
    settings: Settings

    def start(self) -> None:
        self.root = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters", 0))
        self.cluster: AdapterTable | None = None
        self.heads = {"root": self.problem.head}
        self.seen = torch.empty(0, dtype=torch.long)
        kind = GROUPINGS[self.settings.groups]
        self.grouping = kind(self.settings, self.training, self.problem.clients, self.problem.true_groups)

    def stages(self) -> list[Stage]:
        return [Stage(tier, self.training.rounds[tier], tier, private=tier == "leaf") for tier in self.tiers]

    def begin(self, stage: Stage, clients: Tensor, ask: Ask) -> None:
        self.seen = clients
        if stage.tier == "cluster":
            self._form_clusters(clients, ask)
            count = int(self.grouping.member.max()) + 1
            self.cluster = self.problem.fresh("cluster", count, stream(self.training.seed, "fresh adapters", 1))
            self.heads["cluster"] = self.heads["root"].repeated(count)

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        root = shared(self.root, clients)
        if stage.tier == "root" or self.cluster is None:
            return Download(stage, {"root": root}, shared(self.heads["root"], clients))
        member = self.grouping.member[clients]
        tiers = {"root": root, "cluster": Rows(self.cluster, member)}
        return Download(stage, tiers, Rows(self.heads["cluster"], member.clamp_min(0)))

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if stage.tier == "root":
            return self._aggregate_root(upload)
        if stage.tier == "cluster" and self.cluster is not None:
            cluster, heads = self.cluster.each(Tensor.clone), self.heads["cluster"].each(Tensor.clone)
            member = self.grouping.member[upload.clients]
            for group in member.unique():
                members = upload.rows(member == group)
                if members.head is not None and members.images.sum() > 0:
                    cluster.put(group[None], self.averaged(members))
                    heads.put(group[None], members.head.mean(members.images))
            self.cluster, self.heads["cluster"] = cluster, heads
        return {}

    def _aggregate_root(self, upload: Upload) -> dict[str, Any]:
        worked = upload.rows(upload.images > 0)
        if not len(worked.clients) or worked.head is None:
            return {}
        self.remember(worked)
        before, self.root = self.root, self.averaged(worked)
        self.heads["root"] = worked.head.mean(worked.images)
        if not any(B.any() for B in before.B):
            return {"rho": None}  # there was nothing before the first round
        rho = relative_change(self.root.factors, before.factors)
        return {"rho": rho, "stop": rho <= self.settings.tau_rel}

    def averaged(self, upload: Upload) -> AdapterTable:
        """The mean of the clients' adapters as one row, taken of their products, or of A and B apart."""
        (table,) = upload.tiers.values()
        if self.settings.aggregation == "factors":
            return table.mean(upload.images)
        means = [product_space_mean(A, B, upload.images, A.shape[-2]) for A, B in table.factors]
        return AdapterTable([A[None] for A, _ in means], [B[None] for _, B in means])

    def remember(self, upload: Upload) -> None:
        """Note for the grouping what clients made of the root."""
        self.grouping.remember(upload.clients, upload.tiers["root"], self.root)

    def _probe(self, clients: Tensor, ask: Ask) -> Tensor:
        """Have clients train the root for an epoch; returns those that had images to train on."""
        upload = ask(clients, self.configure(PROBE, clients))
        worked = upload.rows(upload.images > 0)
        if len(worked.clients):
            self.remember(worked)
        return worked.clients

    def _form_clusters(self, seen: Tensor, ask: Ask) -> None:
        stale = self.grouping.stale(seen)
        if len(stale):
            self.grouping.trained_root[stale] = False
            self._probe(stale, ask)
        missing = self.grouping.form(seen)
        if len(missing):
            self._route(missing, ask)
            self.grouping.with_all(seen)

    def admit(self, clients: Tensor, ask: Ask) -> None:
        self._route(clients, ask)

    def _route(self, clients: Tensor, ask: Ask) -> None:
        """Join each client to the cluster that its probe points to; to the largest, if it has no image to probe."""
        member = self.grouping.member
        member[clients] = member[member >= 0].mode().values
        probed = self._probe(clients, ask)
        self.grouping.join(clients, probed, self.seen, self.cluster)

    def clustering(self) -> Clustering | None:
        return None if self.grouping.groups is None else Clustering(**self.grouping.groups)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        stage, models = download.stage, self.models(state, download, trainer)
        epochs = 1 if stage == PROBE else None
        how = {"factors": self.factors, **self._how(stage.tier)}
        trained = trainer.train(models, stage.tier, rates=stage.rates, epochs=epochs, **how)
        if stage.tier != "leaf":
            return trained.upload(stage.tier, head=stage != PROBE)
        state.put("leaf", trained.tiers["leaf"])
        state.put("head", trained.head)
        return trained.upload(head=False)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        assert download.head is not None
        tiers, head = dict(download.tiers), download.head
        cluster = tiers["cluster"].slot if "cluster" in tiers else None
        if download.stage.tier == "leaf":
            tiers["leaf"] = state.filled("leaf", lambda: self._first_leaves(state.clients))
            head = state.filled("head", download.head.taken)
        return Models(tiers, head, cluster=cluster)

    def _first_leaves(self, clients: Tensor) -> AdapterTable:
        draws = stream(self.training.seed, "fresh adapters", 2)
        return self.problem.fresh("leaf", self.problem.clients, draws, clients)

    def personal_training(self) -> dict[str, Any]:
        return self._how(self.own_tier)

    def _how(self, tier: str) -> dict[str, Any]:
        """The penalty of a tier, and whether the head is trained with it."""
        gammas = {"root": self.settings.gamma_root, "cluster": self.settings.gamma_cluster}
        head = self.settings.head == "follow" or tier == "root"
        return {"penalty": gammas if any(gammas.values()) else {}, "head": head}

    def tables(self, everyone: Models) -> tuple[dict[str, AdapterTable], dict[str, dict[str, Tensor]]]:
        adapters, last = super().tables(everyone)
        return adapters, {tier: head.tensors() for tier, head in self.heads.items()} | last

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grouping": self.grouping.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.grouping.load_state_dict(state["grouping"])
        super().load_state_dict({**state, "grouping": self.grouping})
