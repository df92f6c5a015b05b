"""FedDPA (Yang et al., Dual-Personalizing Adapter for Federated Foundation Models, NeurIPS 2024): a global and a local
adapter, whose outputs are mixed for each test instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hilora.adapters.composition import Composition, Gains, Sight, Weights
from hilora.adapters.table import Values
from hilora.federated.client import ClientState, Models, Trained
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Rows, Stage, Upload, own, shared
from hilora.federated.settings import Number, Settings, Whole
from hilora.federated.strategies.base import Strategy
from hilora.federated.streams import stream


class FedDPA(Strategy):
    """What the two have in common: FedAvg on the global adapter, and the mix in prediction.

    In every layer `y = W0 x + (1 − a) B_g A_g x + a B_l A_l x`, where a is `weight` times the mean cosine between the
    features of the instance and those of `references` training instances, by the local adapter; at least 0.

    Left open for ViTs, ours: the local adapter comes with a head of its own, which predicts; the global one is trained
    under a global head, averaged with it. An instance's features are what the head sees; a negative mean cosine counts
    as 0. A client that has not trained a local adapter predicts with the global one alone.
    """

    class Settings(Settings):
        weight: Number = Field(0.5, ge=0, le=1, description="largest share of the local adapter")
        references: Whole = Field(5, ge=1, description="training images that an instance is compared with")

    tiers = ("root", "leaf")
    settings: Settings

    def start(self) -> None:
        self.root = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters", 0))
        self.head = self.problem.head

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"root": shared(self.root, clients)}, shared(self.head, clients))

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if upload.head is not None and upload.images.sum() > 0:
            self.root, self.head = upload.tiers["root"].mean(upload.images), upload.head.mean(upload.images)
        return {}

    def mixed(self, leaf: Rows[Any], state: ClientState, download: Download, trainer: Trainer) -> Models:
        """Both adapters, mixed for each instance, and each client's own head if it has trained one."""
        assert download.head is not None
        trained, head = state.has("trained"), download.head
        if trained.any():
            head = own(state.rows("head").taken().where(trained, download.head.taken()))
        count = self.settings.references
        chosen = state.filled("references", lambda: Values(index=trainer.examples(count))).taken()
        mix = NearnessMix(self.settings.weight * trained, chosen["index"])
        return Models({"root": download.tiers["root"], "leaf": leaf}, head, mix)

    def keep(self, state: ClientState, trained: Trained) -> None:
        """The clients keep their local adapters, which count once they were trained."""
        state.put("leaf", trained.tiers["leaf"])
        state.put("head", trained.head)
        state.put("trained", Values(yes=torch.ones(len(trained.images))), trained.images > 0)


class FedDPAF(FedDPA):
    """FedDPA-F: FedAvg to its end, in the rounds of the root and the cluster tier; then each client copies the global
    adapter and fine-tunes it locally, alone in the model."""

    name = "feddpa-f"

    def stages(self) -> list[Stage]:
        rounds = self.training.rounds
        shared_rounds = rounds["root"] + rounds["cluster"]
        return [Stage("root", shared_rounds, "root"), Stage("leaf", rounds["leaf"], "leaf", private=True)]

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        stage = download.stage
        if stage.tier == "root":
            return super().local(state, download, trainer)
        trained = trainer.train(self._alone(state, download), "leaf", rates=stage.rates)
        self.keep(state, trained)
        return trained.upload(head=False)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        if download.stage.tier == "root":
            return super().models(state, download, trainer)
        return self.mixed(self._alone(state, download).tiers["leaf"], state, download, trainer)

    def personalise(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        alone = self._alone(state, download)
        self.keep(state, trainer.train(alone, "leaf", rates="leaf", epochs=self.training.unseen_epochs))
        return self.models(state, download, trainer)

    def _alone(self, state: ClientState, download: Download) -> Models:
        """The local adapters, which begin as copies of the global one, alone in the model."""
        assert download.head is not None
        leaf = state.filled("leaf", download.tiers["root"].taken)
        return Models({"leaf": leaf}, state.filled("head", download.head.taken))


class FedDPAT(FedDPA):
    """FedDPA-T: in each round the local adapter trains inside `a local + (1 − a) frozen global`, a = 0.5, and then the
    global one alone, from the server's; only the global one is averaged."""

    name = "feddpa-t"
    TRAINING_SHARE = 0.5

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), "leaf")]

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        self._train_own(state, download, trainer)
        alone = super().models(state, download, trainer)
        return trainer.train(alone, "root", rates="root").upload("root")

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        def first() -> Any:
            draws = stream(self.training.seed, "fresh adapters", 1)
            return self.problem.fresh("leaf", self.problem.clients, draws, state.clients)

        return self.mixed(state.filled("leaf", first), state, download, trainer)

    def personalise(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        self._train_own(state, download, trainer, epochs=self.training.unseen_epochs)
        return self.models(state, download, trainer)

    def _train_own(self, state: ClientState, download: Download, trainer: Trainer, epochs: int | None = None) -> None:
        mixed, share = self.models(state, download, trainer), self.TRAINING_SHARE
        halves = Models(mixed.tiers, mixed.head, Weights({"leaf": share, "root": 1 - share}))
        self.keep(state, trainer.train(halves, "leaf", rates="leaf", epochs=epochs))


class NearnessMix(Composition):
    """`a leaf + (1 − a) root`, where a is a client's share times how near an instance is to its references.

    Args:
        share: `[n]`.
        references: int64 `[n, m]`, training images of each client.
    """

    def __init__(self, share: Tensor, references: Tensor) -> None:
        self.share, self.references = share, references

    def tensors(self) -> dict[str, Tensor]:
        return {"share": self.share, "references": self.references}

    def like(self, tensors: dict[str, Tensor]) -> NearnessMix:
        return NearnessMix(tensors["share"], tensors["references"])

    def gains(self, bank: int) -> Gains:
        return Weights({"leaf": self.share, "root": 1 - self.share}).gains(bank)

    def seeing(self, sight: Sight) -> Callable[[Tensor], Composition]:
        alone = Weights({"leaf": 1.0, "root": 0.0})
        references = sight.features(sight.training_images(self.references), alone)  # [G, m, D]

        def mix(pixels: Tensor) -> Composition:
            near = nearness(sight.features(pixels, alone), references)
            share = self.share.to(near).unsqueeze(-1) * near  # [G, b]
            return Weights({"leaf": share, "root": 1 - share})

        return mix


def nearness(features: Tensor, references: Tensor) -> Tensor:
    """The mean cosine of images `[G, b, D]` to each client's references `[G, m, D]`, at least 0: `[G, b]`."""
    cosines = F.normalize(features, dim=-1) @ F.normalize(references, dim=-1).mT
    return cosines.mean(-1).clamp_min(0)
