"""Local-LoRA: every client trains an adapter and a head of its own, and nothing is shared."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Stage, Upload
from hilora.federated.strategies.own_head import OwnHead
from hilora.federated.streams import stream


class LocalLoRA(OwnHead):
    """Training without a federation, at the rates that suit a start from nothing: the root's."""

    name = "local-lora"
    tiers = ("leaf",)

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), rates="root", private=True)]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage)

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        return {}

    def first(self, clients: Tensor) -> AdapterTable:
        """The adapters that clients begin with."""
        draws = stream(self.training.seed, "fresh adapters")
        return self.problem.fresh("leaf", self.problem.clients, draws, clients)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        models = self.models(state, download, trainer)
        trained = trainer.train(models, "leaf", rates=download.stage.rates)
        state.put("leaf", trained.tiers["leaf"])
        self.keep_heads(state, trained)
        return trained.upload(head=False)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        leaf = state.filled("leaf", lambda: self.first(state.clients))
        return Models({"leaf": leaf}, self.heads(state, download))
