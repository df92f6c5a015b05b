"""What a strategy can ask of clients: to train, to say how well models do, to name some of their images."""

from __future__ import annotations

import torch
from torch import Tensor

from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Population
from hilora.federated.engine.batched import Cohort, Lower, Task
from hilora.federated.engine.predictor import Scores
from hilora.federated.engine.state import Models, Trained, size, stream
from hilora.federated.settings import RunConfig


class Diverged(ValueError):
    """A training whose numbers are no longer finite; a lower learning rate may help."""


class Work:
    """The clients of a population at work, in one round or for one other purpose.

    Attributes:
        images: how many they have trained on.
        losses: mean losses of all their trainings, `[n]` each.
        parameters: how many numbers a client trained at most.
        true_groups: int64 `[N]`, the true group of each client, or None where there are none.
    """

    def __init__(
        self, cohort: Cohort, images: ImageSet, population: Population, run: RunConfig, purpose: str, round: int = 0
    ) -> None:
        self.cohort, self.population, self.run = cohort, population, run
        self.training_images, self.purpose, self.round = images, purpose, round
        self.images, self.parameters = 0, 0
        self.losses: list[Tensor] = []
        self.true_groups = population.true_groups

    def train(
        self,
        clients: Tensor,
        models: Models,
        tier: str,
        *,
        rates: str | None = None,
        epochs: int | None = None,
        factors: str = "AB",
        lower: Lower | None = None,
        pooled: bool = False,
    ) -> Trained:
        """Local training of the clients `[n]`, a tier and the head.

        Args:
            models: what they start from.
            rates, factors, lower: as in `Task`.
            epochs: as many as in a round of the run by default.
            pooled: all their images are one client's, who starts from the first model.

        Raises:
            Diverged: if an update is not finite; names the clients.
        """
        task = Task(tier, epochs or self.run.local_epochs, rates, factors, lower)
        shares = [self.population.clients[int(client)].train for client in clients]
        if pooled:
            shares, models, clients = [torch.cat(shares)], models.rows(torch.tensor([0])), clients[:1]
        purpose = f"{self.purpose} {tier}"
        trained = self.cohort.train(self.training_images, shares, models, task, clients, purpose, self.round)
        values = (*trained.adapters.values(), *trained.head.values(), *trained.lower.values())
        finite = torch.stack([value.isfinite().flatten(1).all(1) for value in values]).all(0)
        if not finite.all():
            raise Diverged(f"updates of clients {clients[~finite].tolist()} are not finite: lower the learning rate")
        self.images += int(trained.images.sum())
        self.losses.append(trained.loss)
        own = size(trained.adapters, *factors, "gate") if factors else 0
        self.parameters = max(self.parameters, own + size(trained.lower) + size(trained.head))
        return trained

    def scores(self, clients: Tensor, models: Models, images: Tensor | None = None) -> Scores:
        """How the clients `[n]` predict their training images, or those `[n, m]` that are named."""
        shares = [self.population.clients[int(client)].train for client in clients] if images is None else list(images)
        return self.cohort.evaluate(self.training_images, shares, models)

    def examples(self, clients: Tensor, count: int) -> Tensor:
        """Training images of the clients `[n]`, drawn at random: indices int64 `[n, count]`. One with fewer has some of
        them several times; one without any has another's."""
        drawn = []
        everyone = torch.cat([client.train for client in self.population.clients])
        for client in clients.tolist():
            share = self.population.clients[client].train
            share = share if len(share) else everyone
            order = torch.randperm(len(share), generator=stream(self.run.seed, "examples", client))
            drawn.append(share[order.repeat(-(-count // len(share)))[:count]])
        return torch.stack(drawn)
