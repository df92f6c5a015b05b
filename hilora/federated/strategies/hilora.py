"""HiLoRA (Peng et al., CVPR 2026): root, cluster and leaf adapters, trained in a cascade."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.algorithms.aggregation import relative_change
from hilora.algorithms.clustering import Clustering
from hilora.federated.client import ClientState, Models
from hilora.federated.coverage import filled
from hilora.federated.engine.trainer import Trainer
from hilora.federated.grouping import GROUPINGS, GroupingSettings
from hilora.federated.protocol import Download, Rows, Sends, Stage, Upload, fitted, own, shared
from hilora.federated.ranks import compressed, energy_ranks
from hilora.federated.settings import Number
from hilora.federated.strategies.base import Ask, Strategy
from hilora.federated.streams import stream

PROBE = Stage("root", 0, "root", "probe")


class HiLoRA(Strategy):
    """The cascade, with clusters found from what the clients' root adapters learn (`hilora.federated.grouping`).

    All clients train the root; the server averages products (`algorithms.aggregation`). Then each group trains its
    cluster adapter on top of the frozen root, and in the end each client its leaf, which never leaves it. The head
    follows the tier in training: averaged over all, inside of the group, then private.

    What a client with a budget of ranks does not hold of a tier stays, in its term of the mean, as it was (ours): so
    that ranks that few can hold do not fade from round to round.

    With `rank_energy` (ours), a client's budget is one of ranks, and so of bytes, over all tiers together: as many as
    it would hold if it held the same of each. Of the root, once it is trained, clients keep the leading ranks that hold
    this share of the energy of the mean of products; the cluster's adapter may have what is left, as far as `rank`
    gives it room, and is cut likewise; the leaf may have the rest, and is cut to the spectrum of the client's own
    update after the last round.
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
        rank_energy: Number | None = Field(
            None,
            gt=0,
            le=1,
            description="share of a tier's squared singular values that clients keep once it is trained; ranks that "
            "this saves go to the next tier. none: the same ranks of every tier",
        )

        @model_validator(mode="after")
        def _by_products(self) -> Self:
            if self.rank_energy is not None and self.aggregation != "product":
                raise ValueError("rank_energy needs ranks in the order of their size: aggregation='product'")
            return self

    name = "hilora"
    tiers = ("root", "cluster", "leaf")
    unequal = frozenset({"ranks"})
    settings: Settings

    def start(self) -> None:
        self.root = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters", 0))
        self.cluster: AdapterTable | None = None
        self.heads = {"root": self.problem.head}
        self.seen = torch.empty(0, dtype=torch.long)
        kind = GROUPINGS[self.settings.groups]
        problem = self.problem
        common = problem.budgets.common
        self.grouping = kind(self.settings, self.training, problem.clients, problem.true_groups, common)

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
        root, trains = shared(self.root, clients), stage.tier
        if trains == "root" or self.cluster is None:
            ranks, common = self.allowance("root", clients, {}), self.problem.budgets.common
            root = fitted(root, ranks if stage != PROBE or common is None else ranks.clamp_max(common))
            return Download(stage, {"root": root}, shared(self.heads["root"], clients))
        member, tiers = self.grouping.member[clients], dict[str, Rows[AdapterTable]]()
        for tier, rows in (("root", root), ("cluster", Rows(self.cluster, member))):
            ranks = self.allowance(tier, clients, tiers)
            if self.energy is not None and tier != trains:
                ranks = torch.minimum(ranks, energy_ranks(rows.table, self.energy)[rows.slot.clamp_min(0)])
            tiers[tier] = fitted(rows, ranks)
        return Download(stage, tiers, Rows(self.heads["cluster"], member.clamp_min(0)))

    @property
    def energy(self) -> float | None:
        """The share of a tier's energy that clients keep; None: all."""
        return self.settings.rank_energy

    def allowance(self, tier: str, clients: Tensor, held: Mapping[str, Rows[AdapterTable]]) -> Tensor:
        """The ranks that clients `[n]` can hold of a tier, beside what they hold of earlier ones: int64 `[n]`."""
        room, budgets = self.training.rank, self.problem.budgets
        if self.energy is None:
            return budgets.rank(clients, room[tier])
        equal = [budgets.rank(clients, room[one]) for one in self.tiers[: self.tiers.index(tier) + 1]]
        used = [torch.where(rows.slot >= 0, rows.table.rank[rows.slot], 0) for rows in held.values()]
        return (torch.stack(equal).sum(0) - sum(used, start=torch.zeros_like(clients))).clamp_max(room[tier])

    def sends(self, stage: Stage) -> Sends:
        return super().sends(stage)._replace(head=not stage.private and stage != PROBE)

    @property
    def sums(self) -> bool:
        return self.settings.groups == "true"

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if stage.tier == "root":
            return self._aggregate_root(upload)
        if stage.tier == "cluster" and self.cluster is not None:
            cluster, heads = self.cluster.each(Tensor.clone), self.heads["cluster"].each(Tensor.clone)
            member = self.grouping.member[upload.clients]
            for group in member.unique():
                members = upload.rows(member == group)
                if members.head is not None and members.images.sum() > 0:
                    cluster.put(group[None], self.averaged(members, cluster.rows(group[None])))
                    head = self.averaging.mean(members.head, members.images, heads.rows(group[None]))
                    heads.put(group[None], head)
            self.cluster, self.heads["cluster"] = cluster, heads
        return {}

    def _aggregate_root(self, upload: Upload) -> dict[str, Any]:
        worked = upload.rows(upload.images > 0)
        if not len(worked.clients) or worked.head is None:
            return {}
        self.remember(worked)
        before, self.root = self.root, self.averaged(worked, self.root)
        self.heads["root"] = self.averaging.mean(worked.head, worked.images, self.heads["root"])
        if not any(B.any() for B in before.B):
            return {"rho": None}  # there was nothing before the first round
        rho = relative_change(self.root.factors, before.factors)
        return {"rho": rho, "stop": rho <= self.settings.tau_rel}

    def averaged(self, upload: Upload, start: AdapterTable) -> AdapterTable:
        """The mean of the clients' adapters as one row, taken of their products, or of A and B apart."""
        (table,) = upload.tiers.values()
        table = filled(table, start)
        if self.settings.aggregation == "factors":
            return self.averaging.mean(table, upload.images, start)
        return self.averaging.product_mean(table, upload.images, start)

    @property
    def probe_epochs(self) -> int:
        """One; three for unequal clients, of whom the probe is all that is compared, by few ranks: after one epoch its
        noise makes groups of equal clients."""
        return 1 if self.problem.budgets.common is None else 3

    def remember(self, upload: Upload) -> None:
        """Note for the grouping what clients made of the root."""
        self.grouping.remember(upload.clients, upload.tiers["root"], self.root)

    def _probe(self, clients: Tensor, ask: Ask) -> Tensor:
        """Have clients train the root for `probe_epochs`; returns those that had images to train on."""
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
        epochs = self.probe_epochs if stage == PROBE else None
        how = {"factors": self.factors, **self._how(stage.tier)}
        trained = trainer.train(models, stage.tier, rates=stage.rates, epochs=epochs, **how)
        if stage.tier != "leaf":
            return trained.upload(stage.tier, head=stage != PROBE)
        leaf = trained.tiers["leaf"]
        last = download.round == stage.rounds
        state.put("leaf", compressed(leaf, self.energy) if self.energy is not None and last else leaf)
        state.put("head", trained.head)
        return trained.upload(head=False)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        assert download.head is not None
        tiers, head = dict(download.tiers), download.head
        cluster = head.slot.where(tiers["cluster"].slot >= 0, -1) if "cluster" in tiers else None
        if download.stage.tier == "leaf":
            tiers["leaf"] = state.filled("leaf", lambda: self._first_leaves(state.clients, download))
            head = state.filled("head", download.head.taken)
        return Models(tiers, head, cluster=cluster)

    def _first_leaves(self, clients: Tensor, download: Download) -> AdapterTable:
        draws = stream(self.training.seed, "fresh adapters", 2)
        leaves = own(self.problem.fresh("leaf", self.problem.clients, draws, clients))
        return fitted(leaves, self.allowance("leaf", clients, download.tiers)).taken()

    def personalise(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        models = super().personalise(state, download, trainer)
        if self.energy is None:
            return models
        leaf = compressed(models.tiers["leaf"].taken(), self.energy)
        return replace(models, tiers={**models.tiers, "leaf": own(leaf)})

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
