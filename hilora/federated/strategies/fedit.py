"""FedIT (Zhang et al., Towards Building the Federated GPT, 2024): one adapter for all, its factors averaged apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hilora.federated.engine.state import Models, State, Trained, mean, one_for_all, size, stream
from hilora.federated.strategies.base import Stage, Strategy, Traffic


class FedIT(Strategy):
    """FedAvg on A, B and the head."""

    tiers = ("root",)
    own_tier = "root"
    kept = ("root", "head")

    def start(self, head: State) -> None:
        self.root = self.fresh("root", 1, stream(self.run.seed, "fresh adapters"))
        self.head = head

    def stages(self) -> list[Stage]:
        return [Stage("root", self.total_rounds(), rates="root")]

    def models(self, clients: Tensor) -> Models:
        return Models({"root": one_for_all(self.root, clients)}, one_for_all(self.head, clients))

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        if trained.images.sum() > 0:
            self.root = mean(trained.adapters, trained.images)
            self.head = mean(trained.head, trained.images)
        return {}

    def traffic(self, tier: str) -> Traffic:
        numbers = size(self.root) + size(self.head)
        return Traffic(numbers, numbers)
