"""What clients can do with what they have: train, say how well models do, name some of their images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError
from hilora.federated.client import Models, Trained
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Population
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.engine.bench import LocalAlgorithm
from hilora.federated.engine.blocks import Blocks, Parts
from hilora.federated.engine.predictor import Scores
from hilora.federated.engine.shared_pass import Task
from hilora.federated.local.gradient import OneGradient
from hilora.federated.local.sgd import LocalSGD
from hilora.federated.protocol import Rows
from hilora.federated.streams import stream

log = logging.getLogger(__name__)


class Diverged(InvalidValueError):
    """A training in which no client's numbers are finite any more; a lower learning rate may help."""


class Effort(NamedTuple):
    """What a training of n clients was.

    Attributes:
        clients: int64 `[n]`, who they are.
        images: int64 `[n]`, how many each trained on; of all its passes.
        ranks: for each tier, int64 `[n]`, of the adapters in the forward pass; 0 for a client without one.
        trained: the tiers in training.
        factors: which of their factors are trained.
        parts: which blocks the clients train, and have; None: all.
        numbers: int64 `[n]`, how many numbers each trained: of the ranks that it holds, in the blocks that it trains.
        beside: whether it was a probe or a measurement, and no training of a round.
    """

    clients: Tensor
    images: Tensor
    ranks: Mapping[str, Tensor]
    trained: tuple[str, ...]
    factors: str
    parts: Parts | None
    numbers: Tensor
    beside: bool = False


class Trainer:
    """n clients at work, in one round or for one other purpose.

    Attributes:
        clients: int64 `[n]`, who they are.
        images: how many they have trained on.
        losses: mean losses of all their trainings, `[n]` each.
        skipped: ids of clients whose update was not finite: they keep what they started from, and count for no images.
        parameters: how many numbers a client trained at most.
        efforts: what their trainings were.
    """

    def __init__(
        self,
        engine: BatchedEngine,
        images: ImageSet,
        population: Population,
        clients: Tensor,
        purpose: str,
        round: int = 0,
    ) -> None:
        self.engine, self.population, self.settings = engine, population, engine.settings
        self.training_images, self.clients, self.purpose, self.round = images, clients, purpose, round
        self.images, self.parameters = 0, 0
        self.losses: list[Tensor] = []
        self.skipped: list[int] = []
        self.efforts: list[Effort] = []

    @property
    def counts(self) -> Tensor:
        """How many training images each client has, int64 `[n]`."""
        return torch.tensor([len(share) for share in self._shares()])

    def _shares(self) -> list[Tensor]:
        return [self.population.clients[int(client)].train for client in self.clients]

    def train(
        self,
        models: Models,
        tier: str,
        *,
        algorithm: LocalAlgorithm | None = None,
        rates: str | None = None,
        epochs: int | None = None,
        factors: str = "AB",
        head: bool = True,
        penalty: Mapping[str, float] | None = None,
        pooled: bool = False,
        parts: Parts | None = None,
    ) -> Trained:
        """Local training of a tier and the head.

        Args:
            models: what the clients start from.
            tier: which tier is trained.
            algorithm: how; local SGD by default.
            rates: the tier whose learning rates to use; `tier` by default.
            epochs: as many as in a round by default.
            factors: "AB", one of them, or "" to leave the adapters as they are.
            head: whether the head is trained.
            penalty: weight of the tier's overlap with each earlier one.
            pooled: all their images are one client's, who starts from the first model.
            parts: which blocks they train, and have; all by default.

        Raises:
            InvalidValueError: for fewer than one epoch.
            Diverged: if no client's update is finite.
        """
        weights = tuple((penalty or {}).items())
        epochs = self.settings.local_epochs if epochs is None else epochs
        if epochs < 1:
            raise InvalidValueError(f"epochs={epochs}: expected at least 1; leave the training out instead")
        task = Task(tier, algorithm or LocalSGD(), epochs, rates or tier, factors, head, weights)
        shares, clients = self._shares(), self.clients
        if pooled:
            shares, models, clients = [torch.cat(shares)], models.of(torch.tensor([0])), clients[:1]
        purpose = f"{self.purpose} {tier}"
        images, round = self.training_images, self.round
        trained = self.engine.train(images, shares, models, task, clients, purpose, round, parts)
        ranks = {tier: _ranks(rows) for tier, rows in models.tiers.items()}
        numbers = _trained_numbers(trained, task, ranks, self.engine.blocks, parts)
        beside = self.purpose != "training"
        self.efforts.append(Effort(clients, trained.images, ranks, task.tiers, factors, parts, numbers, beside))
        finite = trained.finite()
        if not finite.all():
            broken = clients[~finite.cpu()].tolist()
            if not trained.images[finite.cpu()].any():
                raise Diverged(f"updates of clients {broken} are not finite: lower the learning rate")
            log.warning("updates of clients %s are not finite and left out: lower the learning rate", broken)
            self.skipped += broken
            trained = trained.where(finite, models)
        self.images += int(trained.images.sum())
        self.losses.append(trained.loss)
        self.parameters = max(self.parameters, int(numbers.max()))
        return trained

    def fisher(self, models: Models, tier: str, count: int) -> Tensor:
        """How much each block matters: the diagonal of the empirical Fisher information of a tier's adapters, the mean
        over some of a client's training images of the squares of their gradients, summed over the block.

        Args:
            models: of the clients.
            tier: of which adapters.
            count: how many images of each client, which are drawn at random and are always the same.

        Returns:
            float32 `[n, L]`; 0 for a client without images.
        """
        images, places = self.examples(count).flatten(), torch.arange(len(self.clients)).repeat_interleave(count)
        task = Task(tier, OneGradient(), 1, tier, head=False)
        ids, shares = self.clients[places], list(images[:, None])
        trained = self.engine.train(self.training_images, shares, models.of(places), task, ids, "Fisher information")
        table, blocks = trained.tiers[tier], self.engine.blocks
        ranks = {tier: _ranks(rows) for tier, rows in models.tiers.items()}
        each, none = count * (self.counts > 0), torch.zeros_like(self.clients)
        self.efforts.append(Effort(self.clients, each, ranks, task.tiers, "AB", None, none, beside=True))
        found = torch.zeros(len(self.clients), len(blocks), dtype=torch.float32)
        for pair, of in zip(table.factors, blocks.of, strict=True):
            for gradient in pair:
                squares = gradient.square().sum((-2, -1)).view(len(self.clients), count, -1).mean(1)  # [n, P]
                found.index_add_(1, of, squares.to(found))
        return found.where((self.counts > 0)[:, None], 0)

    def scores(self, models: Models, images: Tensor | None = None) -> Scores:
        """How the models predict the clients' training images, or those `[n, m]` that are named."""
        return self.engine.evaluate(self.training_images, self._shares() if images is None else list(images), models)

    def examples(self, count: int) -> Tensor:
        """Training images of the clients, drawn at random: indices int64 `[n, count]`. One with fewer has some of them
        several times; one without any has another's, or a validation image where nobody has any.

        Raises:
            InvalidValueError: if there is no image at all.
        """
        drawn = []
        people = self.population.clients
        everyone = torch.cat([client.train for client in people])
        everyone = everyone if len(everyone) else torch.cat([client.val for client in people])
        if not len(everyone):
            raise InvalidValueError("there is no image for training or validation: give the client one")
        for client, own in zip(self.clients.tolist(), self._shares(), strict=True):
            share = own if len(own) else everyone
            order = torch.randperm(len(share), generator=stream(self.settings.seed, "examples", client))
            drawn.append(share[order.repeat(-(-count // len(share)))[:count]])
        return torch.stack(drawn)


def _ranks(rows: Rows[AdapterTable]) -> Tensor:
    return torch.where(rows.slot >= 0, rows.table.rank[rows.slot.clamp_min(0)], 0)


def _trained_numbers(
    trained: Trained, task: Task, ranks: Mapping[str, Tensor], blocks: Blocks, parts: Parts | None
) -> Tensor:
    """How many numbers each of n clients trained, int64 `[n]`."""
    shared = [
        *([trained.head] if task.head else []),
        *([trained.composition] if trained.composition is not None else []),
    ]
    whole = sum(value[0].numel() for one in shared for value in one.tensors().values())
    found = torch.full((len(trained.clients),), whole)
    for tier, table in trained.tiers.items():
        factors = task.factors if tier == task.tier else "AB"
        for (A, B), of in zip(table.factors, blocks.of, strict=True):
            projections = len(of) if parts is None else parts.trained[:, of].sum(1)
            each = A.shape[-1] * ("A" in factors) + B.shape[-2] * ("B" in factors)
            found += ranks[tier] * projections * each
    return found
