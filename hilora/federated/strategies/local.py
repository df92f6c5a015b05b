"""Local-LoRA: every client trains an adapter and a head of its own, and nothing is shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from hilora.federated.engine.state import Models, State, Table, Trained, put, stream
from hilora.federated.strategies.base import Stage, Traffic
from hilora.federated.strategies.own_head import OwnHead


class LocalLoRA(OwnHead):
    """Training without a federation, at the rates that suit a start from nothing: the root's."""

    tiers = ("leaf",)
    options: ClassVar[Mapping[str, float]] = {}
    kept: ClassVar[tuple[str, ...]] = ("leaf", "head")

    def start(self, head: State) -> None:
        super().start(head)
        self.leaf = self.fresh("leaf", self.clients, stream(self.run.seed, "fresh adapters"))

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), rates="root")]

    def models(self, clients: Tensor) -> Models:
        return Models({"leaf": Table(self.leaf, clients)}, Table(self.head, clients))

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        put(self.leaf, clients, trained.adapters)
        self.keep_heads(clients, trained)
        return {}

    def traffic(self, tier: str) -> Traffic:
        return Traffic(0, 0)
