"""FDLoRA (Qi et al., Personalized Federated Learning of Large Language Models via Dual LoRA Tuning, 2024): a personal
and a shared adapter, fused in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hilora.federated.engine.state import Models, State, Table, Trained, mean, one_for_all, put, size, stream
from hilora.federated.engine.work import Work
from hilora.federated.strategies.base import Stage, Strategy, Traffic


class FDLoRA(Strategy):
    """Three stages:

    1. In the rounds of the root tier, each client trains its personal adapter by itself.
    2. The shared adapter starts as their mean. In each round clients train it for `inner_epochs`, and the server takes
       a Nesterov step along the mean change. Every `sync` rounds a client's personal adapter becomes the shared one as
       it has just trained it.
    3. In the last round each client fuses the two, `(w1 B_p + w2 B_s)(w1 A_p + w2 A_s)`, with weights that a
       gradient-free search finds on a few of its training images, under an L1 penalty.

    Left open, ours: all personal adapters begin alike, or their mean would be of different bases, and small. The head
    belongs to the adapter it is trained with, and is fused with the same weights. The search is a (1+1) evolution
    strategy from (0.5, 0.5), its steps widened after a success and narrowed after a failure. The outer rate and
    momentum are those of DiLoCo (0.7, 0.9), which the method follows. The upload for the first mean is not counted in
    the traffic.
    """

    tiers = ("root", "leaf")
    options: ClassVar[Mapping[str, float]] = {
        "inner_epochs": 3,
        "sync": 5,
        "outer_lr": 0.7,
        "momentum": 0.9,
        "images": 16,
        "evaluations": 20,
        "l1": 0.05,
    }
    kept = ("phase", "shared", "velocity", "leaf", "head", "weights", "rounds_done")

    def start(self, head: State) -> None:
        self.phase, self.rounds_done = 0, 0  # the phase is the number of the stage
        everyone = torch.arange(self.clients)
        first = self.fresh("leaf", 1, stream(self.run.seed, "fresh adapters"))
        self.leaf = one_for_all(first, everyone).taken()
        self.head = one_for_all(head, everyone).taken()
        self.shared: dict[str, State] = {}  # of adapters and head, and so is the velocity
        self.velocity: dict[str, State] = {}
        self.weights = torch.full((self.clients, 2), 0.5)  # of the personal and the shared one

    def stages(self) -> list[Stage]:
        first, fusion = self.run.rounds["root"], min(1, self.total_rounds() - self.run.rounds["root"])
        return [
            Stage("leaf", first, "root"),
            Stage("root", self.total_rounds() - first - fusion, "root"),
            Stage("leaf", fusion, "leaf"),
        ]

    def begin(self, tier: str, seen: Tensor, work: Work) -> None:
        self.phase += 1
        if tier == "root":
            counts = torch.tensor([len(work.population.clients[int(client)].train) for client in seen])
            for name, state in (("adapters", self.leaf), ("head", self.head)):
                self.shared[name] = mean({key: value[seen] for key, value in state.items()}, counts)
                self.velocity[name] = {key: torch.zeros_like(value) for key, value in self.shared[name].items()}

    def models(self, clients: Tensor) -> Models:
        if self.phase <= 1:
            return Models({"leaf": Table(self.leaf, clients)}, Table(self.head, clients))
        if self.phase == 2:
            return self._shared(clients)
        return self._fused(clients, self.weights[clients])

    def _shared(self, clients: Tensor) -> Models:
        return Models(
            {"root": one_for_all(self.shared["adapters"], clients)}, one_for_all(self.shared["head"], clients)
        )

    def _fused(self, clients: Tensor, weights: Tensor) -> Models:
        def fused(own: State, shared: State) -> Table:
            rows = {}
            for name, value in own.items():
                personal, common = weights.to(value).view(-1, 2, *[1] * (value.dim() - 1)).unbind(1)
                rows[name] = personal * value[clients] + common * shared[name]
            return Table(rows, torch.arange(len(clients)))

        return Models({"leaf": fused(self.leaf, self.shared["adapters"])}, fused(self.head, self.shared["head"]))

    def round(self, stage: Stage, clients: Tensor, work: Work) -> dict[str, Any]:
        if self.phase == 3:
            self.weights[clients] = self._search(clients, work)
            return {"weights": self.weights[clients].mean(0).tolist()}
        epochs = int(self.run.options["inner_epochs"]) * self.run.local_epochs if stage.tier == "root" else None
        trained = work.train(clients, self.models(clients), stage.tier, rates=stage.rates, epochs=epochs)
        return self.aggregate(stage.tier, clients, trained)

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        self.rounds_done += tier == "root"
        if tier == "leaf" or self.rounds_done % int(self.run.options["sync"]) == 0:
            put(self.leaf, clients, trained.adapters)
            put(self.head, clients, trained.head)
        if tier == "root" and trained.images.sum() > 0:
            momentum, rate = self.run.options["momentum"], self.run.options["outer_lr"]
            for name, state in (("adapters", trained.adapters), ("head", trained.head)):
                for key, reached in mean(state, trained.images).items():
                    slope = self.shared[name][key] - reached
                    velocity = momentum * self.velocity[name][key] + slope
                    self.velocity[name][key] = velocity
                    self.shared[name][key] = self.shared[name][key] - rate * (slope + momentum * velocity)
        return {}

    def _search(self, clients: Tensor, work: Work) -> Tensor:
        """The weights `[n, 2]` of the lowest loss plus L1 penalty found for each client."""
        options = self.run.options
        images = work.examples(clients, int(options["images"]))
        draws = stream(self.run.seed, "fusion")

        def objective(weights: Tensor) -> Tensor:
            return work.scores(clients, self._fused(clients, weights), images).loss + options["l1"] * weights.abs().sum(
                1
            )

        best, step = torch.full((len(clients), 2), 0.5), torch.full((len(clients), 1), 0.3)
        lowest = objective(best)
        for _ in range(int(options["evaluations"]) - 1):
            tried = best + step * torch.randn(len(clients), 2, generator=draws)
            value = objective(tried)
            better = (value < lowest)[:, None]
            best, lowest = tried.where(better, best), torch.minimum(value, lowest)
            step = step * torch.where(better, 1.5, 0.85)
        return best

    def admit(self, clients: Tensor, work: Work) -> None:
        """A newcomer starts from the shared adapter and head."""
        models = self._shared(clients)
        put(self.leaf, clients, models.tiers["root"].taken())
        put(self.head, clients, models.head.taken())
        self.weights[clients] = torch.tensor([0.0, 1.0])

    def personalise(self, clients: Tensor, work: Work) -> Models:
        """It trains a personal adapter from there, and fuses the two."""
        personal = Models({"leaf": Table(self.leaf, clients)}, Table(self.head, clients))
        trained = work.train(clients, personal, "leaf", rates="leaf", epochs=self.run.unseen_epochs)
        self.aggregate("leaf", clients, trained)
        return self._fused(clients, self._search(clients, work))

    def traffic(self, tier: str) -> Traffic:
        numbers = size(self.leaf) + size(self.head)
        return Traffic(numbers, numbers) if tier == "root" else Traffic(0, 0)
