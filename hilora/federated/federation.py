"""Both halves of a strategy, the clients between them, and what moves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.budgets import budgets
from hilora.federated.client import ClientStore, Models
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Population
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.engine.post import Post
from hilora.federated.engine.predictor import Scores
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Head, Stage, Upload
from hilora.federated.reception import Reception
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import Strategy, resolve
from hilora.federated.strategies.base import Ask, Problem
from hilora.models.backbone import Backbone
from hilora.reporting.clusters import clusters


class Federation:
    """A strategy and its clients. The strategy is there twice: the server's half, and the clients' half, which has
    nothing but the clients' private states. Messages go between them, and are weighed on their way.

    Attributes:
        server: the server's half.
        client: the clients' half.
        store: the clients' private states.
        post: what was moved.
        reception: what is done with messages before the server's half has them.
        engine: where clients train and predict.
        budgets: of the clients.
        stages: of the strategy; `stage` is the number of the one that is trained.
        round_in_stage: rounds of it that are done.
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
    ) -> None:
        if not any(len(client.train) for client in population.clients if client.seen):
            raise InvalidValueError("no seen client has an image to train on: give the clients more images")
        method = resolve(strategy)
        self.name, self.settings, self.backbone = method.name or type(method).__name__, settings, backbone
        self.train_images, self.test_images = train.to(device), test.to(device)
        self.population = population
        self.engine = BatchedEngine(backbone, method.adapters(settings), settings, device, dtype)
        count, classes = len(population.clients), len(train.classes)
        head = Head(torch.zeros(1, classes, backbone.features), torch.zeros(1, classes))
        self.budgets = budgets(settings, population)
        blocks, truth = self.engine.blocks.of, population.true_groups
        problem = Problem(settings, count, self.engine.fresh, head, truth, self.budgets, blocks)
        self.server, self.client = (copy.deepcopy(method).join(problem) for _ in range(2))
        self.server.start()
        self.stages = self.server.stages()
        self.stage, self.round_in_stage = 0, 0
        self.store, self.post = ClientStore(count), Post(count)
        self.reception = Reception(self.server, len(population.seen))

    @property
    def current(self) -> Stage:
        """The stage that is trained; after the last one, that."""
        return self.stages[min(self.stage, len(self.stages) - 1)]

    def exchange(self, trainer: Trainer, download: Download) -> Upload:
        """Send clients a download; they work, and send something back."""
        if self.server.travels:
            self.post.send(trainer.clients, download)
        upload = self.client.local(self.store.of(trainer.clients), download, trainer)
        if self.server.travels:
            self.post.receive(upload)
        return self.reception(download, upload, trainer.purpose, trainer.round)

    def asks(self, purpose: str) -> Ask:
        """What a strategy can ask clients by, outside of rounds."""
        return lambda clients, download: self.exchange(self.trainer(clients, purpose), download)

    def trainer(self, clients: Tensor, purpose: str, round: int = 0) -> Trainer:
        """Clients `[n]` at work; their random streams depend on what for."""
        return Trainer(self.engine, self.train_images, self.population, clients, purpose, round)

    def _configured(self, clients: Tensor) -> Download:
        """What the server has for clients now."""
        return self.server.serve(self.current, clients).at(self.round_in_stage + 1)

    def models(self, clients: Tensor) -> Models:
        """What clients `[n]` predict with now. To measure them is no traffic."""
        return self.client.models(self.store.of(clients), self._configured(clients), self.trainer(clients, "models"))

    def personalised(self, clients: Tensor) -> Models:
        """What unseen clients `[n]` predict with after they trained by themselves, from what they are sent."""
        download, trainer = self._configured(clients), self.trainer(clients, "unseen")
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

    def communication(self, rounds: int) -> dict[str, Any]:
        """Bytes that a seen client sent and was sent, on the mean of so many rounds, and each client in all."""
        mean = {way: moved / max(rounds, 1) for way, moved in self.moved().items()}
        return {**mean, "per_client": {"up": self.post.up.tolist(), "down": self.post.down.tolist()}}

    def moved(self) -> dict[str, float]:
        """Bytes that a seen client has sent and been sent so far, on the mean."""
        seen = self.population.seen
        return {"up": float(self.post.up[seen].double().mean()), "down": float(self.post.down[seen].double().mean())}

    def clusters(self) -> dict[str, Any] | None:
        """The groups that the method formed, as the summary has them."""
        seen, unseen = self.population.seen, self.population.unseen
        labels, joined = (self.models(clients).cluster if len(clients) else None for clients in (seen, unseen))
        truth = self.population.true_groups
        return clusters(labels, joined, None if truth is None else truth[seen])
