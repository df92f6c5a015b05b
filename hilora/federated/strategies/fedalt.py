"""FedALT (Bian et al., Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA, AAAI 2026): each
client's own adapter beside the mean of all others', weighed by a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hilora.adapters.composition import Gate
from hilora.adapters.table import AdapterTable, Values
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Stage, Upload, own
from hilora.federated.strategies.base import Ask
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.streams import stream


class FedALT(SharableHead):
    """`y = W0 x + α(x) B_L A_L x + (1 − α(x)) B_R A_R x`, with α a softmax gate of each token and projection.

    A client trains its L, its gate and its head, and uploads L; nothing overwrites them. R, frozen, is the mean of the
    other clients' A_L and of their B_L, as last uploaded.

    Left open for ViTs, ours: the head is private, as the gate is, unless `shared_head` says otherwise. The gate is
    linear without a bias, as in the authors' code. An unseen client's R is the mean over all seen clients.
    """

    name = "fedalt"
    tiers = ("root", "leaf")

    def start(self) -> None:
        super().start()
        self.uploaded, _ = self.first(torch.arange(self.problem.clients))
        self.seen = torch.empty(0, dtype=torch.long)

    def begin(self, stage: Stage, clients: Tensor, ask: Ask) -> None:
        self.seen = clients

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), "root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"root": own(self._rest_of_world(clients))}, self.sent_head(clients))

    def _rest_of_world(self, clients: Tensor) -> AdapterTable:
        among = torch.isin(clients, self.seen)  # these are left out of their own means
        others = (len(self.seen) - among.long()).clamp_min(1)

        def rest(value: Tensor) -> Tensor:
            shape = (-1, *[1] * (value.dim() - 1))
            mine = torch.where(among.view(shape), value[clients], 0)
            return (value[self.seen].sum(0) - mine) / others.view(shape)

        table = self.uploaded
        return AdapterTable([rest(A) for A in table.A], [rest(B) for B in table.B])

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        self.uploaded.put(upload.clients, upload.tiers["leaf"])
        self.average_heads(upload)
        return {}

    def first(self, clients: Tensor) -> tuple[AdapterTable, Values]:
        """The adapters and the gates that clients begin with."""
        generator = stream(self.training.seed, "fresh adapters")
        leaf = self.problem.fresh("leaf", self.problem.clients, generator, clients)
        gates = {}
        for index, A in enumerate(leaf.A):
            _, projections, _, width = A.shape
            bound = width**-0.5  # as nn.Linear starts
            gate = torch.empty(self.problem.clients, projections, 2, width).uniform_(-bound, bound, generator=generator)
            gates[f"gate.{index}"] = gate[clients].to(A)
        return leaf, Values(**gates)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        models = self.models(state, download, trainer)
        trained = trainer.train(models, "leaf", rates=download.stage.rates)
        assert trained.composition is not None
        state.put("leaf", trained.tiers["leaf"])
        state.put("gate", Values(**trained.composition.tensors()))
        self.keep_heads(state, trained)
        return trained.upload("leaf", head=self.shares_head)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        leaf = state.filled("leaf", lambda: self.first(state.clients)[0])
        gate = state.filled("gate", lambda: self.first(state.clients)[1]).taken()
        composition = Gate("leaf", "root", list(gate.tensors().values()))
        return Models({"root": download.tiers["root"], "leaf": leaf}, self.heads(state, download), composition)
