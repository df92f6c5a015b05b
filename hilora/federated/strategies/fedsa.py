"""FedSA-LoRA (Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025): A is shared,
B is the client's own. FedVLM (Mitra et al., Scalable Personalized Vision-Language Models through Federated Learning,
ECAI 2025) is its mirror."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Sends, Stage, Upload, own, shared
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.streams import stream


class FedSALoRA(SharableHead):
    """Both factors are trained; A is averaged, B and the head stay with the client from round to round.

    With `shared_factor="B"` it is the other way round, as in FedVLM's personalised LoRA: B is averaged and A stays with
    the client.

    The head is private, as in the authors' configuration, unless `shared_head` says otherwise. All clients begin with
    one A, also where A is their own (ours: products of one B with A's of random starts would have little in common),
    and an unseen client with that A or a B of zeros.
    """

    class Settings(SharableHead.Settings):
        shared_factor: Literal["A", "B"] = Field(
            "A", description="the factor that is averaged; each client keeps the other one"
        )

    name = "fedsa-lora"
    tiers = ("leaf",)
    settings: Settings

    @property
    def own_factor(self) -> str:
        """The factor that each client keeps."""
        return "B" if self.settings.shared_factor == "A" else "A"

    def first(self, factor: str) -> AdapterTable:
        """What all clients begin with."""
        return self.problem.fresh("leaf", 1, stream(self.training.seed, "fresh adapters")).only(factor)

    def start(self) -> None:
        super().start()
        self.common = self.first(self.settings.shared_factor)

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), rates="root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"leaf": shared(self.common, clients)}, self.sent_head(clients))

    def sends(self, stage: Stage) -> Sends:
        return Sends({"leaf": self.settings.shared_factor}, head=self.shares_head)

    @property
    def sums(self) -> bool:
        return True

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        self.average_heads(upload)
        if upload.images.sum() > 0:
            self.common = self.averaging.mean(upload.tiers["leaf"], upload.images, self.common)
        return {}

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        models = self.models(state, download, trainer)
        trained = trainer.train(models, "leaf", rates=download.stage.rates)
        state.put("leaf", trained.tiers["leaf"].only(self.own_factor))
        self.keep_heads(state, trained)
        return trained.upload("leaf", factors=self.settings.shared_factor, head=self.shares_head)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        own_factor = state.filled("leaf", lambda: self.first(self.own_factor).repeated(len(state.clients)))
        return Models(
            {"leaf": own(own_factor.taken().joined(download.tiers["leaf"].taken()))}, self.heads(state, download)
        )
