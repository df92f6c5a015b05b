"""IFCA (Ghosh et al., An Efficient Framework for Clustered Federated Learning, 2020) with adapters. A reference row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hilora.federated.engine.state import Models, State, Table, Trained, mean, put, size, stream
from hilora.federated.engine.work import Work
from hilora.federated.strategies.base import Stage, Strategy, Traffic


class IFCA(Strategy):
    """K global adapters and heads; a client takes the ones with the lowest loss on its training images, trains them,
    and each is averaged over those who took it.

    Fresh adapters have no effect, and a head of zeros gives every model one loss: the K heads start at random instead,
    as `nn.Linear` does, and clients choose from the start. The losses are those of `images` of a client's training
    images, a mini-batch, as the paper allows.
    """

    tiers = ("root",)
    own_tier = "root"
    options: ClassVar[Mapping[str, float]] = {"k": 5, "images": 32}
    kept = ("root", "head", "member", "seen")

    def start(self, head: State) -> None:
        self.k = int(self.run.options["k"])
        self.root = self.fresh("root", self.k, stream(self.run.seed, "fresh adapters"))
        generator, bound = stream(self.run.seed, "first heads"), head["weight"].shape[-1] ** -0.5
        self.head = {
            name: torch.empty(self.k, *value.shape[1:]).uniform_(-bound, bound, generator=generator).to(value)
            for name, value in head.items()
        }
        self.member = torch.zeros(self.clients, dtype=torch.long)
        self.seen = torch.empty(0, dtype=torch.long)

    def begin(self, tier: str, seen: Tensor, work: Work) -> None:
        self.seen = seen
        self._choose(seen, work)

    def stages(self) -> list[Stage]:
        return [Stage("root", self.total_rounds(), "root")]

    def models(self, clients: Tensor) -> Models:
        return self._of(self.member[clients])

    def _of(self, member: Tensor) -> Models:
        return Models({"root": Table(self.root, member)}, Table(self.head, member))

    def round(self, stage: Stage, clients: Tensor, work: Work) -> dict[str, Any]:
        noted = super().round(stage, clients, work)
        self._choose(self.seen, work)
        return noted

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        for group in self.member[clients].unique():
            members = trained.rows(self.member[clients] == group)
            if members.images.sum() > 0:
                put(self.root, group[None], mean(members.adapters, members.images))
                put(self.head, group[None], mean(members.head, members.images))
        return {}

    def _choose(self, clients: Tensor, work: Work) -> None:
        images = work.examples(clients, int(self.run.options["images"]))
        losses = [work.scores(clients, self._of(torch.full_like(clients, k)), images).loss for k in range(self.k)]
        self.member[clients] = torch.stack(losses).argmin(0)

    def admit(self, clients: Tensor, work: Work) -> None:
        self._choose(clients, work)

    def joined(self, clients: Tensor) -> Tensor:
        return self.member[clients]

    def traffic(self, tier: str) -> Traffic:
        numbers = size(self.root) + size(self.head)
        return Traffic(numbers, self.k * numbers)
