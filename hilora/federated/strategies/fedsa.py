"""FedSA-LoRA (Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025): A is shared,
B is the client's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hilora.federated.engine.state import Models, State, Table, Trained, mean, put, size, stream
from hilora.federated.strategies.base import Traffic
from hilora.federated.strategies.local import LocalLoRA
from hilora.federated.strategies.own_head import OwnHead


class FedSALoRA(LocalLoRA):
    """Both factors are trained; A is averaged, B and the head stay with the client from round to round.

    The head is private, as in the authors' configuration, unless `shared_head` says otherwise. All clients begin with
    one A, and an unseen client with a B of zeros.
    """

    options: ClassVar[Mapping[str, float]] = OwnHead.options
    kept: ClassVar[tuple[str, ...]] = ("leaf", "head", "A")

    def start(self, head: State) -> None:
        super().start(head)
        first = self.fresh("leaf", 1, stream(self.run.seed, "fresh adapters"))
        self.A = {name: value for name, value in first.items() if name[0] == "A"}

    def models(self, clients: Tensor) -> Models:
        shared = {name: value.expand(len(clients), *value.shape[1:]) for name, value in self.A.items()}
        own = {name: value[clients] for name, value in self.leaf.items() if name[0] == "B"}
        everyone = torch.arange(len(clients))
        return Models({"leaf": Table(shared | own, everyone)}, Table(self.head, clients))

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        put(self.leaf, clients, {name: value for name, value in trained.adapters.items() if name[0] == "B"})
        self.keep_heads(clients, trained)
        if trained.images.sum() > 0:
            self.A = mean({name: value for name, value in trained.adapters.items() if name[0] == "A"}, trained.images)
        return {}

    def traffic(self, tier: str) -> Traffic:
        numbers = size(self.A) + self.head_traffic()
        return Traffic(numbers, numbers)
