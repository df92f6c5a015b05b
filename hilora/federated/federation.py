"""Both halves of a strategy, the clients between them, and what moves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.budgets import budgets, fitted
from hilora.federated.callbacks.base import Callback
from hilora.federated.client import ClientStore, Models
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Population
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.engine.predictor import Scores
from hilora.federated.engine.trainer import Trainer
from hilora.federated.loop import Loop, Work
from hilora.federated.protocol import Download, Head, Upload
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import Strategy, resolve
from hilora.federated.strategies.base import Problem
from hilora.models.backbone import Backbone
from hilora.reporting.clusters import clusters


class Federation(Loop):
    """A strategy and its clients. The strategy is there twice: the server's half, and the clients' half, which has
    nothing but the clients' private states. Messages go between them, and are weighed on their way.

    Attributes:
        client: the clients' half.
        store: the clients' private states.
        engine: where clients train and predict.
        budgets: of the clients.
    """

    def __init__(
        self,
        strategy: str | type[Strategy] | Strategy,
        settings: TrainingSettings,
        backbone: Backbone,
        train: ImageSet,
        test: ImageSet,
        population: Population,
        device: torch.device,
        dtype: torch.dtype,
        out: Path,
        callbacks: Sequence[Callback],
    ) -> None:
        if not any(len(client.train) for client in population.clients if client.seen):
            raise InvalidValueError("no seen client has an image to train on: give the clients more images")
        method = resolve(strategy)
        self.backbone = backbone
        self.train_images, self.test_images = train.to(device), test.to(device)
        self.population = population
        self.engine = BatchedEngine(backbone, method.adapters(settings), settings, device, dtype)
        count, classes = len(population.clients), len(train.classes)
        head = Head(torch.zeros(1, classes, backbone.features), torch.zeros(1, classes))
        blocks, truth = self.engine.blocks.of, population.true_groups
        adapter = self.engine.fresh(method.tiers[-1], 1, torch.Generator())
        kept = fitted(settings, method.unequal, method.most_ranks(settings), adapter, blocks)
        self.budgets = budgets(kept, population)
        problem = Problem(settings, count, self.engine.fresh, head, truth, self.budgets, blocks)
        server, self.client = (copy.deepcopy(method).join(problem) for _ in range(2))
        super().__init__(server, out, callbacks)
        self.store = ClientStore(count)

    @property
    def seen(self) -> Tensor:
        return self.population.seen

    @property
    def unseen(self) -> Tensor:
        return self.population.unseen

    def work(self, clients: Tensor, download: Download, purpose: str, round: int = 0) -> Work:
        trainer = self.trainer(clients, purpose, round)
        upload = self.exchange(trainer, download)
        notes = {"skipped": trainer.skipped} if trainer.skipped else {}
        return Work(upload, trainer.images, _mean(trainer.losses), trainer.parameters, trainer.efforts, notes)

    def exchange(self, trainer: Trainer, download: Download) -> Upload:
        """Send clients a download; they work, and send something back."""
        if self.server.travels:
            self.post.send(trainer.clients, download)
        upload = self.client.local(self.store.of(trainer.clients), download, trainer)
        if self.server.travels:
            self.post.receive(upload)
        return self.reception(download, upload, trainer.purpose, trainer.round, len(self.seen))

    def trainer(self, clients: Tensor, purpose: str, round: int = 0) -> Trainer:
        """Clients `[n]` at work; their random streams depend on what for."""
        return Trainer(self.engine, self.train_images, self.population, clients, purpose, round)

    def models(self, clients: Tensor) -> Models:
        """What clients `[n]` predict with now. To measure them is no traffic."""
        return self.client.models(self.store.of(clients), self.configured(clients), self.trainer(clients, "models"))

    def personalised(self, clients: Tensor) -> Models:
        """What unseen clients `[n]` predict with after they trained by themselves, from what they are sent."""
        download, trainer = self.configured(clients), self.trainer(clients, "unseen")
        if self.server.travels:
            self.post.send(clients, download)
        return self.client.personalise(self.store.of(clients), download, trainer)

    def scores(self, clients: Tensor, models: Models) -> dict[str, Scores]:
        """How the clients predict their validation and test images."""
        members = [self.population.clients[int(client)] for client in clients]
        train, test, evaluate = self.train_images, self.test_images, self.engine.evaluate
        return {
            "val": evaluate(train, [client.val for client in members], models),
            "test": evaluate(test, [client.test for client in members], models, train),
        }

    def accuracies(self, clients: Tensor, personal: bool = False) -> dict[str, Tensor]:
        scores = self.scores(clients, self.personalised(clients) if personal else self.models(clients))
        return {split: one.correct for split, one in scores.items()}

    def clusters(self) -> dict[str, Any] | None:
        """The groups that the method formed, as the summary has them."""
        seen, unseen = self.population.seen, self.population.unseen
        labels, joined = (self.models(clients).cluster if len(clients) else None for clients in (seen, unseen))
        truth = self.population.true_groups
        return clusters(labels, joined, None if truth is None else truth[seen])


def _mean(losses: Sequence[Tensor]) -> float | None:
    known = torch.cat([torch.empty(0), *(loss[~loss.isnan()] for loss in losses)])
    return float(known.mean()) if len(known) else None
