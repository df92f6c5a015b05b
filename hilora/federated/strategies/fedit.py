"""FedIT (Zhang et al., 2024): one adapter for all, its factors averaged one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..state import Models, State, Table, Trained, mean, stream
from .base import Stage, Strategy


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
        only = torch.zeros(len(clients), dtype=torch.long)
        return Models({"root": Table(self.root, only)}, Table(self.head, only))

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        if trained.images.sum() > 0:
            self.root = mean(trained.adapters, trained.images)
            self.head = mean(trained.head, trained.images)
        return {}
