"""Clients whose training is simple enough to work out by hand what a strategy makes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.budgets import Budgets
from hilora.federated.client import ClientStore, Models, Trained
from hilora.federated.engine.predictor import Scores
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Head, Upload
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import STRATEGIES
from hilora.federated.strategies.base import Problem

CLIENTS, PROJECTIONS, WIDTH, RANK = 8, 3, 20, 2
GROUPS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])  # the last two are unseen
BLOCKS = torch.arange(PROJECTIONS)  # a block for each projection
ALL, SEEN, UNSEEN = torch.arange(CLIENTS), torch.arange(6), torch.tensor([6, 7])
HEAD = Head(torch.zeros(1, 4, 5), torch.zeros(1, 4))


def fresh(tier: str, slots: int, generator: torch.Generator, rows: Tensor | None = None) -> AdapterTable:
    A = torch.randn(slots, PROJECTIONS, RANK, WIDTH, generator=generator)
    table = AdapterTable([A], [torch.zeros(slots, PROJECTIONS, WIDTH, RANK)])
    return table if rows is None else table.rows(rows)


def settings(**options: Any) -> TrainingSettings:
    return TrainingSettings(**({"rank": RANK, "rounds": [2, 2, 1]} | options))


class Call(NamedTuple):
    """A training that a strategy asked for."""

    clients: list[int]
    tier: str
    models: Models
    how: dict[str, Any]


class ByHand(Trainer):
    """In the place of `Trainer`: a training adds the client's number + 1 to B, A, gates and the head; the loss of a
    client is how far the mean of its head's bias is from its number."""

    def __init__(self, clients: Tensor, weights: Tensor, calls: list[Call]) -> None:
        self.clients, self.weights, self.calls = clients, weights, calls

    @property
    def counts(self) -> Tensor:
        return self.weights[self.clients]

    def train(self, models: Models, tier: str, **how: Any) -> Trained:
        clients = self.clients
        self.calls.append(Call(clients.tolist(), tier, models, how))
        if how.get("pooled"):
            clients, models = clients[:1], models.of(torch.tensor([0]))
        number = clients + 1.0

        def moved(value: Tensor) -> Tensor:
            return value + number.view(-1, *[1] * (value.dim() - 1))

        def adapters(tier: str, factors: str) -> AdapterTable:
            table = models.tiers[tier].taken()
            return table.joined(table.only(factors).each(moved)) if factors else table

        tiers = {tier: adapters(tier, how.get("factors", "AB"))}
        algorithm, composition = how.get("algorithm"), models.composition
        tiers |= {more: adapters(more, "AB") for more in algorithm.more_tiers} if algorithm else {}
        head = models.head.taken().each(moved) if how.get("head", True) else models.head.taken()
        gates = composition.each(moved) if composition is not None and composition.trained else None
        return Trained(clients, tiers, head, gates, self.weights[clients], torch.ones(len(clients)))

    def scores(self, models: Models, images: Tensor | None = None) -> Scores:
        loss = (models.head.taken().bias.mean(1) - self.clients).abs()
        return Scores(torch.zeros(len(loss)), loss)

    def examples(self, count: int) -> Tensor:
        return self.clients[:, None] * 100 + torch.arange(count)


class Halves:
    """Both halves of a strategy for eight clients, in the place of `Federation`.

    Args:
        name: of the strategy.
        weights: how many images each client has; 10 by default.
        options: of `TrainingSettings`, and of the strategy; and `ranks`, the most that each client holds.
    """

    true_groups: Tensor | None = GROUPS
    budgets = Budgets(torch.zeros(CLIENTS, dtype=torch.long))

    def __init__(self, name: str, weights: list[int] | None = None, **options: Any) -> None:
        shared = {key: options.pop(key) for key in list(options) if key in TrainingSettings.model_fields}
        ranks = options.pop("ranks", None)
        held = self.budgets
        if ranks is not None:
            held = Budgets(torch.zeros(CLIENTS, dtype=torch.long), torch.tensor(ranks))
        problem = Problem(settings(**shared), CLIENTS, fresh, HEAD, self.true_groups, held, [BLOCKS])
        self.server, self.client = (self._half(name, options).join(problem) for _ in range(2))
        self.server.start()
        self.stages, self.stage, self.done = self.server.stages(), self.server.stages()[0], 0
        self.store = ClientStore(CLIENTS)
        self.weights, self.calls = torch.tensor(weights or [10] * CLIENTS), list[Call]()

    def _half(self, name: str, options: dict[str, Any]) -> Any:
        return STRATEGIES[name](**options)

    def trainer(self, clients: Tensor) -> Trainer:
        return ByHand(clients, self.weights, self.calls)

    def ask(self, clients: Tensor, download: Download) -> Upload:
        upload: Upload = self.client.local(self.store.of(clients), download, self.trainer(clients))
        return upload

    def begin(self, number: int = 0, clients: Tensor = SEEN) -> None:
        """The stage of this number begins."""
        self.stage, self.done = self.stages[number], 0
        self.server.begin(self.stage, clients, self.ask)

    def round(self, clients: Tensor = SEEN) -> dict[str, Any]:
        """A round of the stage; returns what the server notes."""
        self.done += 1
        noted: dict[str, Any] = self.server.aggregate(self.stage, self.ask(clients, self._sent(clients, self.done)))
        return noted

    def one_round(self, clients: Tensor = SEEN) -> Any:
        """The first round of the first stage; returns the halves."""
        self.begin()
        self.round(clients)
        return self

    def all_rounds(self) -> Any:
        """All rounds of all stages; returns the halves."""
        for number, stage in enumerate(self.stages):
            self.begin(number)
            for _ in range(stage.rounds):
                self.round()
        return self

    def _sent(self, clients: Tensor, round: int) -> Download:
        download: Download = self.server.configure(self.stage, clients).at(round)
        return download

    def _served(self, clients: Tensor) -> Download:
        download: Download = self.server.serve(self.stage, clients).at(self.done + 1)
        return download

    def models(self, clients: Tensor = SEEN) -> Models:
        sent, state = self._served(clients), self.store.of(clients)
        models: Models = self.client.models(state, sent, self.trainer(clients))
        return models

    def personalised(self, clients: Tensor = UNSEEN) -> Models:
        sent = self._served(clients)
        models: Models = self.client.personalise(self.store.of(clients), sent, self.trainer(clients))
        return models

    def admit(self) -> None:
        self.server.admit(UNSEEN, self.ask)

    def B(self, tier: str, clients: Tensor = ALL) -> Tensor:
        """B of the clients' adapters of a tier, `[n, P, out, r]`."""
        return self.models(clients).tiers[tier].taken().B[0]

    def bias(self, clients: Tensor = ALL) -> Tensor:
        """Of the heads that the clients predict with, `[n, classes]`."""
        return self.models(clients).head.taken().bias

    def kept(self, name: str) -> Any:
        """What the clients keep for themselves, `[N, ...]`."""
        return self.store.tables[name]


def everywhere(value: Tensor, number: float) -> None:
    torch.testing.assert_close(value, torch.full_like(value, number))


def each(value: Tensor, numbers: list[float]) -> None:
    """Row i of the value is number i everywhere."""
    assert len(value) == len(numbers)
    for row, number in zip(value, numbers, strict=True):
        everywhere(row, number)
