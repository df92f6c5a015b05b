"""Clients of two groups, whose training pulls the adapters into directions of their group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.client import Models, Trained
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Head
from hilora.federated.streams import stream
from tests.federated.strategies.by_hand import GROUPS, PROJECTIONS, RANK, WIDTH, Call, Halves


class Grouped(Trainer):
    """In the place of `Trainer`: pulls B into directions of the client's group, and the head to the client's number."""

    def __init__(self, clients: Tensor, weights: Tensor, calls: list[Call], seed: int) -> None:
        self.clients, self.weights, self.calls, self.seed = clients, weights, calls, seed

    @property
    def counts(self) -> Tensor:
        return self.weights[self.clients]

    def train(self, models: Models, tier: str, **how: Any) -> Trained:
        clients, calls = self.clients, self.calls
        calls.append(Call(clients.tolist(), tier, models, how))
        start, head = models.tiers[tier].taken(), models.head.taken()
        directions = torch.linalg.qr(torch.randn(2, PROJECTIONS, WIDTH, RANK, generator=stream(0, "directions")))[0]
        noise = torch.stack(
            [torch.randn(PROJECTIONS, WIDTH, RANK, generator=stream(self.seed, "noise", int(c))) for c in clients]
        )
        inputs = torch.randn(PROJECTIONS, RANK, WIDTH, generator=stream(0, "inputs"))
        left, _, right = torch.linalg.svd(inputs @ start.A[0].mT)
        pull = (
            (directions[GROUPS[clients]] + 0.1 * noise) @ left @ right
        )  # turns with A: B A gains the same in any basis
        number = clients.float()
        moved = Head(head.weight + number.view(-1, 1, 1), head.bias + number.view(-1, 1))
        tiers = {tier: AdapterTable(start.A, [start.B[0] + pull * (self.weights[clients] > 0).view(-1, 1, 1, 1)])}
        return Trained(clients, tiers, moved, None, self.weights[clients], torch.ones(len(clients)))


class GroupedHalves(Halves):
    """A method whose clients train so; `trained` says which have trained since it was emptied."""

    def trainer(self, clients: Tensor) -> Trainer:
        return Grouped(clients, self.weights, self.calls, seed=self.done)

    @property
    def trained(self) -> list[int]:
        return [client for call in self.calls for client in call.clients]


class WithoutTruth(GroupedHalves):
    """Of a partition without true groups."""

    true_groups = None


def products(table: AdapterTable) -> Tensor:
    """`B A` of each adapter, `[S, P, out, in]`."""
    ((A, B),) = table.factors
    return B @ A
