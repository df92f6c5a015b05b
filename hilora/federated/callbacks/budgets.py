"""What clients of each budget reach, and what it costs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hilora.federated.callbacks.base import Callback, Round
from hilora.federated.callbacks.metrics import Metrics
from hilora.federated.callbacks.unseen import UnseenClients
from hilora.federated.engine.flops import Flops
from hilora.federated.engine.trainer import Effort
from hilora.federated.protocol import Stage
from hilora.reporting.statistics import summarise

if TYPE_CHECKING:
    from hilora.federated.simulation import Simulation


class BudgetGroups(Callback):
    """Figures of the clients of each budget, where the settings give some; but for `unseen`, of the seen ones.

    Bytes are those of all messages over the number of rounds. FLOPs (`engine.flops`) are of all that the group trained,
    also beside the rounds, over the images that it trained on in rounds. `held` are the ranks of each tier in the last
    training of each client, on the mean, and `parameters` how many numbers one trained at most.
    """

    name = "budgets"

    def begin(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def __init__(self) -> None:
        self.flops = torch.empty(0, dtype=torch.float64)  # of all training so far, of each client
        self.images = torch.empty(0, dtype=torch.long)  # of the rounds
        self.parameters = torch.empty(0, dtype=torch.long)  # the most that each client trained
        self.held: dict[str, Tensor] = {}  # for each tier the ranks that each client had last; -1: it never trained

    @cached_property
    def _counter(self) -> Flops:
        simulation = self._simulation
        return Flops(simulation.engine, len(simulation.train_images.classes), simulation.server.merged)

    def stage_begun(self, simulation: Simulation, stage: Stage) -> None:
        self._count(simulation, simulation.probes)

    def commit(self, simulation: Simulation, round: Round) -> None:
        self._count(simulation, round.efforts)

    def _count(self, simulation: Simulation, efforts: Sequence[Effort]) -> None:
        if not simulation.budgets.unequal:
            return
        if not len(self.images):
            count = len(simulation.population.clients)
            self.flops, self.images, self.parameters = (
                value.new_zeros(count) for value in (self.flops, self.images, self.parameters)
            )
        for effort in efforts:
            who = effort.clients
            self.flops[who] += self._counter.image(effort) * effort.images
            if effort.beside:
                continue
            self.images[who] += effort.images
            self.parameters[who] = torch.maximum(self.parameters[who], effort.numbers)
            for tier, ranks in effort.ranks.items():
                self.held.setdefault(tier, torch.full_like(self.parameters, -1))[who] = ranks

    def summary(self, simulation: Simulation) -> Mapping[str, Any]:
        budgets, seen = simulation.budgets, simulation.population.seen
        if not budgets.unequal:
            return {}
        each: dict[str, Any] = {}
        for one in simulation.callbacks:
            if isinstance(one, Metrics | UnseenClients):
                each |= one.per_client
        groups = [seen[budgets.group[seen] == group] for group in budgets.group.unique()]
        return {"budgets": [self._group(simulation, clients, each) for clients in groups if len(clients)]}

    def _group(self, simulation: Simulation, clients: Tensor, each: Mapping[str, Any]) -> dict[str, Any]:
        budgets, post, rounds = simulation.budgets, simulation.post, max(simulation.round, 1)
        unseen = simulation.unseen[budgets.group[simulation.unseen] == budgets.group[clients[0]]]
        images = int(self.images[clients].sum()) if len(self.images) else 0
        held = {tier: ranks[clients] for tier, ranks in self.held.items()}
        return {
            "ranks": None if budgets.ranks is None else int(budgets.ranks[clients[0]]),
            "layers": None if budgets.layers is None else int(budgets.layers[clients[0]]),
            "clients": clients.tolist(),
            "accuracy": summarise(_of(each, "ids", "test", clients)),
            "unseen": {
                name: summarise(_of(each, "unseen_ids", f"unseen_{name}", unseen))["mean"]
                for name in ("zero_leaf", "leaf")
            },
            "held": {
                tier: float(ranks[ranks >= 0].double().mean()) for tier, ranks in held.items() if (ranks >= 0).any()
            },
            "parameters": int(self.parameters[clients].max()) if len(self.parameters) else 0,
            "up": float(post.up[clients].double().mean()) / rounds,
            "down": float(post.down[clients].double().mean()) / rounds,
            "flops": float(self.flops[clients].sum()) / images if images else None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"flops": self.flops, "images": self.images, "parameters": self.parameters, "held": self.held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.flops, self.images = state["flops"], state["images"]
            self.parameters, self.held = state["parameters"], state["held"]


def _of(each: Mapping[str, Any], ids: str, figure: str, clients: Tensor) -> Tensor:
    """A figure of some clients `[n]`, NaN where it was not measured."""
    known = dict(zip(each.get(ids, ()), each.get(figure, ()), strict=False))
    return torch.tensor([known.get(client, torch.nan) for client in clients.tolist()])
