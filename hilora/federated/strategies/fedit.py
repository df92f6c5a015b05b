"""FedIT (Zhang et al., Towards Building the Federated GPT, 2024): one adapter for all, its factors averaged apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hilora.federated.protocol import Download, Stage, Upload, shared
from hilora.federated.strategies.base import Strategy
from hilora.federated.streams import stream


class FedIT(Strategy):
    """FedAvg on A, B and the head."""

    name = "fedit"
    tiers = ("root",)
    own_tier = "root"

    def start(self) -> None:
        self.root = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters"))
        self.head = self.problem.head

    def stages(self) -> list[Stage]:
        return [Stage("root", self.total_rounds(), rates="root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        root = self.fitted(shared(self.root, clients), clients)
        return Download(stage, {"root": root}, shared(self.head, clients))

    @property
    def sums(self) -> bool:
        return True

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if upload.images.sum() > 0 and upload.head is not None:
            self.root = self.root.joined(self.averaging.mean(upload.tiers["root"], upload.images, self.root))
            self.head = self.averaging.mean(upload.head, upload.images, self.head)
        return {}
