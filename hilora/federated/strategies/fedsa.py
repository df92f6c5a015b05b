"""FedSA-LoRA (Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025): A is shared,
B is the client's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Sends, Stage, Upload, own, shared
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.streams import stream


class FedSALoRA(SharableHead):
    """Both factors are trained; A is averaged, B and the head stay with the client from round to round.

    The head is private, as in the authors' configuration, unless `shared_head` says otherwise. All clients begin with
    one A, and an unseen client with a B of zeros.
    """

    name = "fedsa-lora"
    tiers = ("leaf",)

    def start(self) -> None:
        super().start()
        self.A = self.problem.fresh("leaf", 1, stream(self.training.seed, "fresh adapters")).only("A")

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), rates="root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"leaf": shared(self.A, clients)}, self.sent_head(clients))

    def sends(self, stage: Stage) -> Sends:
        return Sends({"leaf": "A"}, head=self.shares_head)

    @property
    def sums(self) -> bool:
        return True

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        self.average_heads(upload)
        if upload.images.sum() > 0:
            self.A = self.averaging.mean(upload.tiers["leaf"], upload.images, self.A)
        return {}

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        models = self.models(state, download, trainer)
        trained = trainer.train(models, "leaf", rates=download.stage.rates)
        state.put("leaf", trained.tiers["leaf"].only("B"))
        self.keep_heads(state, trained)
        return trained.upload("leaf", factors="A", head=self.shares_head)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        zeros = self.problem.fresh("leaf", 1, stream(self.training.seed, "fresh adapters")).only("B")
        B = state.filled("leaf", lambda: zeros.repeated(len(state.clients)))
        return Models({"leaf": own(B.taken().joined(download.tiers["leaf"].taken()))}, self.heads(state, download))
