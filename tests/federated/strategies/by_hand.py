"""Clients whose training is simple enough to work out by hand what a strategy makes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hilora.federated.engine.predictor import Scores
from hilora.federated.engine.state import Models, State, Trained
from hilora.federated.engine.work import Work
from hilora.federated.settings import RunConfig
from hilora.federated.strategies import STRATEGIES, Strategy

CLIENTS, PROJECTIONS, WIDTH, RANK = 8, 3, 20, 2
GROUPS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])  # the last two are unseen
SEEN, UNSEEN = torch.arange(6), torch.tensor([6, 7])
HEAD = {"weight": torch.zeros(1, 4, 5), "bias": torch.zeros(1, 4)}


def fresh(tier: str, slots: int, generator: torch.Generator) -> State:
    A = torch.randn(slots, PROJECTIONS, RANK, WIDTH, generator=generator)
    return {"A0": A, "B0": torch.zeros(slots, PROJECTIONS, WIDTH, RANK)}


def run(**options: Any) -> RunConfig:
    fields: dict[str, Any] = {"rank": RANK, "rounds": [2, 2, 1], "k_max": 4}
    return RunConfig(**(fields | options))


def make(name: str, **options: Any) -> Any:
    """A strategy for eight clients, all of whose settings are its own defaults but for those given."""
    kind: type[Strategy] = STRATEGIES[name]
    return kind(kind.adapted(run(**options)), fresh, HEAD, CLIENTS)


class Call(NamedTuple):
    """A training that a strategy asked for."""

    clients: list[int]
    tier: str
    models: Models
    epochs: int | None
    factors: str
    pooled: bool


class ByHand(Work):
    """In the place of `Work`: a training adds the client's number + 1 to B, A, gates and the head; the loss of a client
    is its entry in `losses` for the head's bias that it is asked about."""

    def __init__(self, weights: list[int] | None = None) -> None:
        self.calls: list[Call] = []
        self.weights = torch.tensor(weights or [10] * CLIENTS)
        self.true_groups = GROUPS

    def train(
        self,
        clients: Tensor,
        models: Models,
        tier: str,
        **how: Any,
    ) -> Trained:
        factors, lower = how.get("factors", "AB"), how.get("lower")
        pooled = how.get("pooled", False)
        self.calls.append(Call(clients.tolist(), tier, models, how.get("epochs"), factors, pooled))
        if pooled:
            clients, models = clients[:1], models.rows(torch.tensor([0]))
        number = clients.float() + 1

        def moved(state: State, which: str) -> State:
            added = {name: number.view(-1, *[1] * (value.dim() - 1)) for name, value in state.items()}
            return {name: value + added[name] * (name[0] in which) for name, value in state.items()}

        adapters, head = models.tiers[tier].taken(), models.head.taken()
        below = moved(models.tiers[lower.tier].taken(), "AB") if lower is not None else {}
        ones = torch.ones(len(clients))
        return Trained(moved(adapters, factors + "g"), moved(head, "wb"), self.weights[clients], ones, below)

    def scores(self, clients: Tensor, models: Models, images: Tensor | None = None) -> Scores:
        """The loss is how far the mean of a client's head bias is from its number."""
        loss = (models.head.taken()["bias"].mean(1) - clients).abs()
        return Scores(torch.zeros(len(clients)), loss)

    def examples(self, clients: Tensor, count: int) -> Tensor:
        return clients[:, None] * 100 + torch.arange(count)


def rounds(strategy: Any, work: Any, count: int | None = None, clients: Tensor = SEEN) -> None:
    """All rounds of all stages, or the first so many."""
    done = 0
    for stage in strategy.stages():
        strategy.begin(stage.tier, SEEN, work)
        for _ in range(stage.rounds):
            if count is not None and done == count:
                return
            strategy.round(stage, clients, work)
            done += 1
