"""PF2LoRA (Hao et al., Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach
via Two-Level LoRA, 2025): a common adapter, and a small one of the client's on top of it, as a bilevel problem."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from hilora.adapters.config import HiLoRAConfig
from hilora.federated.client import ClientState
from hilora.federated.engine.trainer import Trainer
from hilora.federated.local.bilevel import Bilevel
from hilora.federated.protocol import Download, Stage, Upload
from hilora.federated.settings import Number, TrainingSettings, Whole
from hilora.federated.strategies.own_adapter import OwnAdapter


class PF2LoRA(OwnAdapter):
    """`W0 + B A + D C` with ranks r and 2. In each step the client's (C, D) takes a step of SGD with the rate `alpha`,
    and the common (A, B) one of AdamW with the exact gradient through that step; (A, B) is averaged.

    Left open, ours: the head is private, as in FedSA-LoRA, unless `shared_head` says otherwise, and trained by AdamW
    beside (A, B), since plain SGD at a rate that moves (C, D) overshoots there; both levels take their gradients from
    the same batch; (C, D) is scaled as (A, B) is. An unseen client trains (C, D) and the head by AdamW, under the
    common adapter as it is.
    """

    class Settings(OwnAdapter.Settings):
        alpha: Number = Field(0.01, gt=0, description="learning rate of SGD at the lower level")
        own_rank: Whole = Field(2, ge=1, description="rank of a client's own adapter")

    name = "pf2lora"
    settings: Settings

    def adapters(self, training: TrainingSettings) -> HiLoRAConfig:
        config, rank = super().adapters(training), self.settings.own_rank
        scale = training.lora_alpha["root"] / training.rank["root"]
        r, alpha = (
            {"root": training.rank["root"], "leaf": rank},
            {"root": training.lora_alpha["root"], "leaf": rank * scale},
        )
        return replace(config, r=r, lora_alpha=alpha)

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), "root")]

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        problem = Bilevel("leaf", self.settings.alpha)
        models = self.models(state, download, trainer)
        trained = trainer.train(models, "root", rates=download.stage.rates, algorithm=problem)
        return self.keep(state, trained)
