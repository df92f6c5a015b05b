"""Central training: one adapter and head on the images of all seen clients together. A reference row."""

from __future__ import annotations

from hilora.federated.client import ClientState
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Upload
from hilora.federated.strategies.fedit import FedIT


class Central(FedIT):
    """What no federation has: the clients' images are pooled, and trained on for as many epochs as they would be."""

    name = "central"
    travels = False

    @property
    def sums(self) -> bool:
        return False

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        models = self.models(state, download, trainer)
        return trainer.train(models, "root", rates=download.stage.rates, pooled=True).upload("root")
