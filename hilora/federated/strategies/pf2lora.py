"""PF2LoRA (Hao et al., Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach
via Two-Level LoRA, 2025): a common adapter, and a small one of the client's on top of it, as a bilevel problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from hilora.federated.engine.batched import Lower
from hilora.federated.engine.state import Models, State, Table, Trained, mean, one_for_all, put, size, stream
from hilora.federated.engine.work import Work
from hilora.federated.settings import RunConfig
from hilora.federated.strategies.base import Stage, Traffic
from hilora.federated.strategies.own_head import OwnHead


class PF2LoRA(OwnHead):
    """`W0 + B A + D C` with ranks r and 2. In each step the client's (C, D) takes a step of SGD with the rate `alpha`,
    and the common (A, B) one of AdamW with the exact gradient through that step; (A, B) is averaged.

    Left open, ours: the head is private, as in FedSA-LoRA, unless `shared_head` says otherwise, and trained by AdamW
    beside (A, B), since plain SGD at a rate that moves (C, D) overshoots there; both levels take their gradients from
    the same batch; (C, D) is scaled as (A, B) is. An unseen client trains (C, D) and the head by AdamW, under the
    common adapter as it is.
    """

    tiers = ("root", "leaf")
    options: ClassVar[Mapping[str, float]] = {**OwnHead.options, "alpha": 0.01, "rank": 2}
    kept = ("root", "leaf", "head")

    @classmethod
    def adapted(cls, run: RunConfig) -> RunConfig:
        run = super().adapted(run)
        rank = int(run.options["rank"])
        scale = run.lora_alpha["root"] / run.rank["root"]
        return replace(run, rank={**run.rank, "leaf": rank}, lora_alpha={**run.lora_alpha, "leaf": rank * scale})

    def start(self, head: State) -> None:
        super().start(head)
        self.root = self.fresh("root", 1, stream(self.run.seed, "fresh adapters", 0))
        self.leaf = self.fresh("leaf", self.clients, stream(self.run.seed, "fresh adapters", 1))

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), "root")]

    def models(self, clients: Tensor) -> Models:
        tiers = {"root": one_for_all(self.root, clients), "leaf": Table(self.leaf, clients)}
        return Models(tiers, Table(self.head, clients))

    def round(self, stage: Stage, clients: Tensor, work: Work) -> dict[str, Any]:
        lower = Lower("leaf", self.run.options["alpha"])
        trained = work.train(clients, self.models(clients), "root", rates=stage.rates, lower=lower)
        return self.aggregate(stage.tier, clients, trained)

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        put(self.leaf, clients, trained.lower)
        self.keep_heads(clients, trained)
        if trained.images.sum() > 0:
            self.root = mean(trained.adapters, trained.images)
        return {}

    def traffic(self, tier: str) -> Traffic:
        numbers = size(self.root) + self.head_traffic()
        return Traffic(numbers, numbers)
