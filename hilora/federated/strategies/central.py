"""Central training: one adapter and head on the images of all seen clients together. A reference row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hilora.federated.engine.work import Work
from hilora.federated.strategies.base import Stage, Traffic
from hilora.federated.strategies.fedit import FedIT


class Central(FedIT):
    """What no federation has: the clients' images are pooled, and trained on for as many epochs as they would be."""

    def round(self, stage: Stage, clients: Tensor, work: Work) -> dict[str, Any]:
        trained = work.train(clients, self.models(clients), "root", rates=stage.rates, pooled=True)
        return self.aggregate("root", clients[:1], trained)

    def traffic(self, tier: str) -> Traffic:
        return Traffic(0, 0)
