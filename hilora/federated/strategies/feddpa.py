"""FedDPA (Yang et al., Dual-Personalizing Adapter for Federated Foundation Models, NeurIPS 2024): a global and a local
adapter, whose outputs are mixed for each test instance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hilora.federated.engine.state import Mix, Models, State, Table, Trained, mean, one_for_all, put, size, stream
from hilora.federated.engine.work import Work
from hilora.federated.strategies.base import Stage, Strategy, Traffic


class _FedDPA(Strategy):
    """What the two have in common: FedAvg on the global adapter, and the mix in prediction.

    In every layer `y = W0 x + (1 − a) B_g A_g x + a B_l A_l x`, where a is `weight` times the mean cosine between the
    features of the instance and those of `references` training instances, by the local adapter; at least 0.

    Left open for ViTs, ours: the local adapter comes with a head of its own, which predicts; the global one is trained
    under a global head, averaged with it. An instance's features are what the head sees; a negative mean cosine counts
    as 0. A client that has not trained a local adapter predicts with the global one alone.
    """

    tiers = ("root", "leaf")
    options: ClassVar[Mapping[str, float]] = {"weight": 0.5, "references": 5}
    kept = ("root", "head", "leaf", "own_head", "references", "has_own")

    def start(self, head: State) -> None:
        self.root = self.fresh("root", 1, stream(self.run.seed, "fresh adapters", 0))
        self.head = head
        self.leaf: State = {}
        self.own_head: State = {}
        self.references = torch.empty(0, dtype=torch.long)  # [N, m]
        self.has_own = torch.zeros(self.clients, dtype=torch.bool)  # a local adapter that was trained

    def choose_references(self, work: Work) -> None:
        self.references = work.examples(torch.arange(self.clients), int(self.run.options["references"]))

    def shared(self, clients: Tensor) -> Models:
        """The global model alone."""
        return Models({"root": one_for_all(self.root, clients)}, one_for_all(self.head, clients))

    def models(self, clients: Tensor) -> Models:
        if not self.leaf:
            return self.shared(clients)
        has_own = self.has_own[clients]
        mix = Mix("leaf", "root", self.run.options["weight"] * has_own, self.references[clients])
        tiers = {"root": one_for_all(self.root, clients), "leaf": Table(self.leaf, clients)}
        own, shared = Table(self.own_head, clients).taken(), one_for_all(self.head, clients).taken()
        head = {
            name: torch.where(has_own.view(-1, *[1] * (own[name].dim() - 1)), own[name], shared[name]) for name in own
        }
        return Models(tiers, Table(head, torch.arange(len(clients))), mix)

    @abstractmethod
    def local(self, clients: Tensor) -> Models:
        """What the clients' local adapters are trained in."""

    def personalise(self, clients: Tensor, work: Work) -> Models:
        epochs = self.run.unseen_epochs
        self.aggregate("leaf", clients, work.train(clients, self.local(clients), "leaf", rates="leaf", epochs=epochs))
        return self.models(clients)

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        if tier == "leaf":
            put(self.leaf, clients, trained.adapters)
            put(self.own_head, clients, trained.head)
            self.has_own[clients] |= trained.images > 0
        elif trained.images.sum() > 0:
            self.root, self.head = mean(trained.adapters, trained.images), mean(trained.head, trained.images)
        return {}

    def global_traffic(self) -> Traffic:
        numbers = size(self.root) + size(self.head)
        return Traffic(numbers, numbers)


class FedDPAF(_FedDPA):
    """FedDPA-F: FedAvg to its end, in the rounds of the root and the cluster tier; then each client copies the global
    adapter and fine-tunes it locally, alone in the model."""

    def stages(self) -> list[Stage]:
        rounds = self.run.rounds
        return [Stage("root", rounds["root"] + rounds["cluster"], "root"), Stage("leaf", rounds["leaf"], "leaf")]

    def begin(self, tier: str, seen: Tensor, work: Work) -> None:
        if tier == "leaf":
            everyone = torch.arange(self.clients)
            self.leaf = one_for_all(self.root, everyone).taken()
            self.own_head = one_for_all(self.head, everyone).taken()
            self.choose_references(work)

    def round(self, stage: Stage, clients: Tensor, work: Work) -> dict[str, Any]:
        models = self.shared(clients) if stage.tier == "root" else self.local(clients)
        trained = work.train(clients, models, stage.tier, rates=stage.rates)
        return self.aggregate(stage.tier, clients, trained)

    def local(self, clients: Tensor) -> Models:
        return Models({"leaf": Table(self.leaf, clients)}, Table(self.own_head, clients))

    def traffic(self, tier: str) -> Traffic:
        return Traffic(0, 0) if tier == "leaf" else self.global_traffic()


class FedDPAT(_FedDPA):
    """FedDPA-T: in each round the local adapter trains inside `a local + (1 − a) frozen global`, a = 0.5, and then the
    global one alone, from the server's; only the global one is averaged."""

    TRAINING_SHARE = 0.5

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), "leaf")]

    def begin(self, tier: str, seen: Tensor, work: Work) -> None:
        self.leaf = self.fresh("leaf", self.clients, stream(self.run.seed, "fresh adapters", 1))
        self.own_head = one_for_all(self.head, torch.arange(self.clients)).taken()
        self.choose_references(work)

    def round(self, stage: Stage, clients: Tensor, work: Work) -> dict[str, Any]:
        own = work.train(clients, self.local(clients), "leaf", rates="leaf")
        shared = work.train(clients, self.shared(clients), "root", rates="root")
        return self.aggregate("leaf", clients, own) | self.aggregate("root", clients, shared)

    def local(self, clients: Tensor) -> Models:
        return self.models(clients)._replace(mix=Mix("leaf", "root", self.TRAINING_SHARE))

    def traffic(self, tier: str) -> Traffic:
        return self.global_traffic()
