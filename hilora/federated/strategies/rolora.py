"""RoLoRA (Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS 2025): B and A
are trained in turns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hilora.federated.client import ClientState
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Sends, Stage, Upload
from hilora.federated.strategies.fedit import FedIT


class RoLoRA(FedIT):
    """In one round all clients train B, in the next A, and the factor at rest is the same for all: so the mean of the
    products is the product of the means, as where A is never trained, but A is learned, too.

    B begins: while it is zero, A has no gradient. Only the factor of the round is sent. A round in which nobody had
    images is not a turn.

    Left open for ViTs, ours: the head is trained and averaged in every round. An unseen client trains both factors at
    once.
    """

    name = "rolora"

    def start(self) -> None:
        super().start()
        self.turn = "B"

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return super().configure(stage._replace(task=self.turn), clients)

    def sends(self, stage: Stage) -> Sends:
        return Sends({"root": stage.task}, head=True)

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        noted = super().aggregate(stage, upload)
        if upload.images.sum() > 0:
            self.turn = "A" if upload.tiers["root"].B else "B"
        return noted

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        stage, models = download.stage, self.models(state, download, trainer)
        trained = trainer.train(models, "root", rates=stage.rates, factors=stage.task)
        return trained.upload("root", factors=stage.task)
