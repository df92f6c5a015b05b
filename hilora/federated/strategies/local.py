"""Local-LoRA: every client trains an adapter and a head of its own, and nothing is shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..state import Models, State, Table, Trained, stream
from .base import Stage, Strategy


class LocalLoRA(Strategy):
    """Training without a federation, at the rates that suit a start from nothing: the root's."""

    tiers = ("leaf",)
    own_rates = "root"
    predicts_unseen = False
    kept = ("leaf", "head")

    def start(self, head: State) -> None:
        self.leaf = self.fresh("leaf", self.clients, stream(self.run.seed, "fresh adapters"))
        self.head = Table(head, torch.zeros(self.clients, dtype=torch.long)).taken()

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), rates="root")]

    def models(self, clients: Tensor) -> Models:
        return Models({"leaf": Table(self.leaf, clients)}, Table(self.head, clients))

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        put(self.leaf, clients, trained.adapters)
        put(self.head, clients, trained.head)
        return {}


def put(state: State, clients: Tensor, rows: State) -> None:
    """Write the rows `[n, ...]` of the clients `[n]` into a table of all clients."""
    for name, value in rows.items():
        state[name][clients] = value
