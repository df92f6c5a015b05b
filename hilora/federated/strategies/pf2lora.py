"""PF2LoRA (Hao et al., Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach
via Two-Level LoRA, 2025): a common adapter, and a small one of the client's on top of it, as a bilevel problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field
from torch import Tensor

from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.table import AdapterTable
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.local.bilevel import Bilevel
from hilora.federated.protocol import Download, Stage, Upload, shared
from hilora.federated.settings import Number, TrainingSettings, Whole
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.streams import stream


class PF2LoRA(SharableHead):
    """`W0 + B A + D C` with ranks r and 2. In each step the client's (C, D) takes a step of SGD with the rate `alpha`,
    and the common (A, B) one of AdamW with the exact gradient through that step; (A, B) is averaged.

    Left open, ours: the head is private, as in FedSA-LoRA, unless `shared_head` says otherwise, and trained by AdamW
    beside (A, B), since plain SGD at a rate that moves (C, D) overshoots there; both levels take their gradients from
    the same batch; (C, D) is scaled as (A, B) is. An unseen client trains (C, D) and the head by AdamW, under the
    common adapter as it is.
    """

    class Settings(SharableHead.Settings):
        alpha: Number = Field(0.01, gt=0, description="learning rate of SGD at the lower level")
        own_rank: Whole = Field(2, ge=1, description="rank of a client's own adapter")

    name = "pf2lora"
    tiers = ("root", "leaf")
    settings: Settings

    def adapters(self, training: TrainingSettings) -> HiLoRAConfig:
        config, rank = super().adapters(training), self.settings.own_rank
        scale = training.lora_alpha["root"] / training.rank["root"]
        r, alpha = (
            {"root": training.rank["root"], "leaf": rank},
            {"root": training.lora_alpha["root"], "leaf": rank * scale},
        )
        return replace(config, r=r, lora_alpha=alpha)

    def start(self) -> None:
        super().start()
        self.root = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters", 0))

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), "root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"root": shared(self.root, clients)}, self.sent_head(clients))

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        self.average_heads(upload)
        if upload.images.sum() > 0:
            self.root = upload.tiers["root"].mean(upload.images)
        return {}

    def first(self, clients: Tensor) -> AdapterTable:
        """The own adapters that clients begin with."""
        draws = stream(self.training.seed, "fresh adapters", 1)
        return self.problem.fresh("leaf", self.problem.clients, draws, clients)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        problem = Bilevel("leaf", self.settings.alpha)
        models = self.models(state, download, trainer)
        trained = trainer.train(models, "root", rates=download.stage.rates, algorithm=problem)
        state.put("leaf", trained.tiers["leaf"])
        self.keep_heads(state, trained)
        return trained.upload("root", head=self.shares_head)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        leaf = state.filled("leaf", lambda: self.first(state.clients))
        return Models({"root": download.tiers["root"], "leaf": leaf}, self.heads(state, download))
