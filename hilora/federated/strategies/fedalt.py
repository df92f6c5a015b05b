"""FedALT (Bian et al., Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA, AAAI 2026): each
client's own adapter beside the mean of all others', weighed by a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hilora.federated.engine.state import Mix, Models, State, Table, Trained, put, size, stream
from hilora.federated.engine.work import Work
from hilora.federated.strategies.base import Stage, Traffic
from hilora.federated.strategies.own_head import OwnHead


class FedALT(OwnHead):
    """`y = W0 x + α(x) B_L A_L x + (1 − α(x)) B_R A_R x`, with α a softmax gate of each token and projection.

    A client trains its L, its gate and its head, and uploads L; nothing overwrites them. R, frozen, is the mean of the
    other clients' A_L and of their B_L, as last uploaded.

    Left open for ViTs, ours: the head is private, as the gate is, unless `shared_head` says otherwise. The gate is
    linear without a bias, as in the authors' code. An unseen client's R is the mean over all seen clients.
    """

    tiers = ("root", "leaf")
    kept = ("leaf", "head", "seen")

    def start(self, head: State) -> None:
        super().start(head)
        generator = stream(self.run.seed, "fresh adapters")
        self.leaf = self.fresh("leaf", self.clients, generator)
        for name in [name for name in self.leaf if name[0] == "A"]:
            _, projections, _, width = self.leaf[name].shape
            bound = width**-0.5  # as nn.Linear starts
            gate = torch.empty(self.clients, projections, 2, width).uniform_(-bound, bound, generator=generator)
            self.leaf[f"gate{name[1:]}"] = gate.to(self.leaf[name])
        self.seen = torch.empty(0, dtype=torch.long)

    def begin(self, tier: str, seen: Tensor, work: Work) -> None:
        self.seen = seen

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), "root")]

    def models(self, clients: Tensor) -> Models:
        tiers = {
            "root": Table(self._rest_of_world(clients), torch.arange(len(clients))),
            "leaf": Table(self.leaf, clients),
        }
        return Models(tiers, Table(self.head, clients), Mix("leaf", "root"))

    def _rest_of_world(self, clients: Tensor) -> State:
        among = torch.isin(clients, self.seen)  # these are left out of their own means
        others = (len(self.seen) - among.long()).clamp_min(1)
        rest = {}
        for name, value in self.leaf.items():
            if name[0] in "AB":
                shape = (-1, *[1] * (value.dim() - 1))
                own = torch.where(among.view(shape), value[clients], 0)
                rest[name] = (value[self.seen].sum(0) - own) / others.view(shape)
        return rest

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        put(self.leaf, clients, trained.adapters)
        self.keep_heads(clients, trained)
        return {}

    def traffic(self, tier: str) -> Traffic:
        numbers = size(self.leaf, "A", "B") + self.head_traffic()
        return Traffic(numbers, numbers)

    def tables(self) -> tuple[dict[str, State], dict[str, State]]:
        adapters, heads = super().tables()
        gates = {name: value for name, value in self.leaf.items() if name.startswith("gate")}
        return adapters, {"leaf": heads["leaf"] | gates}
