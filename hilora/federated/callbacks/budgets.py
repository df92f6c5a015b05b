"""What clients of each budget reach, and what it costs them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hilora.federated.callbacks.base import Callback, Round
from hilora.federated.callbacks.metrics import Metrics
from hilora.federated.engine.flops import Flops
from hilora.reporting.statistics import summarise

if TYPE_CHECKING:
    from hilora.federated.simulation import Simulation


class BudgetGroups(Callback):
    """Figures of the seen clients of each budget, where the settings give some.

    Bytes are those of all messages over the number of rounds. FLOPs are of training on one image, on the mean of all
    images that the group trained on (`engine.flops`).
    """

    name = "budgets"

    def begin(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def __init__(self) -> None:
        self.flops = torch.empty(0, dtype=torch.float64)  # of all training so far, of each client
        self.images = torch.empty(0, dtype=torch.long)

    @cached_property
    def _counter(self) -> Flops:
        simulation = self._simulation
        return Flops(simulation.engine, len(simulation.train_images.classes), simulation.server.merged)

    def commit(self, simulation: Simulation, round: Round) -> None:
        if not simulation.budgets.unequal:
            return
        if not len(self.images):
            count = len(simulation.population.clients)
            self.flops, self.images = self.flops.new_zeros(count), self.images.new_zeros(count)
        for effort in round.efforts:
            self.flops[effort.clients] += self._counter.image(effort) * effort.images
            self.images[effort.clients] += effort.images

    def summary(self, simulation: Simulation) -> Mapping[str, Any]:
        budgets, seen = simulation.budgets, simulation.population.seen
        if not budgets.unequal:
            return {}
        (metrics,) = (one for one in simulation.callbacks if isinstance(one, Metrics))
        correct = torch.full((len(budgets.group),), torch.nan)
        if metrics.per_client:
            correct[metrics.per_client["ids"]] = torch.tensor(metrics.per_client["test"])
        groups = [seen[budgets.group[seen] == group] for group in budgets.group.unique()]
        return {"budgets": [self._group(simulation, clients, correct) for clients in groups if len(clients)]}

    def _group(self, simulation: Simulation, clients: Tensor, correct: Tensor) -> dict[str, Any]:
        budgets, post, rounds = simulation.budgets, simulation.post, max(simulation.round, 1)
        images = int(self.images[clients].sum()) if len(self.images) else 0
        return {
            "ranks": None if budgets.ranks is None else int(budgets.ranks[clients[0]]),
            "layers": None if budgets.layers is None else int(budgets.layers[clients[0]]),
            "clients": clients.tolist(),
            "accuracy": summarise(correct[clients]),
            "up": float(post.up[clients].double().mean()) / rounds,
            "down": float(post.down[clients].double().mean()) / rounds,
            "flops": float(self.flops[clients].sum()) / images if images else None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"flops": self.flops, "images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.flops, self.images = state["flops"], state["images"]
