"""One adapter for all, of which each client trains those of some blocks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hilora.federated.client import ClientState, Models, Trained
from hilora.federated.engine.blocks import Parts
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Sends, Stage, Upload
from hilora.federated.strategies.fedit import FedIT


class SomeBlocks(FedIT):
    """FedAvg on A, B and the head, block by block: the mean over the clients that trained it, by images; a block that
    nobody trained stays. Which blocks a client trains is drawn anew for each round. It sends the adapters of these
    alone, and the head.

    Everybody predicts with the whole model. An unseen client's own training is of as many blocks as its budget has.
    """

    unequal = frozenset({"layers"})

    def start(self) -> None:
        super().start()
        self.done = 0  # rounds

    @abstractmethod
    def drawn(self, clients: Tensor) -> Tensor:
        """The blocks that the clients `[n]` of the coming round train: bool `[n, L]`."""

    @abstractmethod
    def parts(self, blocks: Tensor) -> Parts:
        """What clients train and have, of the blocks that they are to train, bool `[n, L]`."""

    def budget(self, clients: Tensor) -> Tensor:
        """How many blocks the clients `[n]` train, int64 `[n]`."""
        layers, depth = self.problem.budgets.layers, self.problem.depth
        return torch.full((len(clients),), depth) if layers is None else layers[clients].clamp_max(depth)

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return replace(super().configure(stage, clients), blocks=self.drawn(clients))

    def sends(self, stage: Stage) -> Sends:
        return super().sends(stage)._replace(partial=True)

    @property
    def sums(self) -> bool:
        return False

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        self.done += 1
        if upload.images.sum() > 0 and upload.head is not None:
            self.root = self.averaging.covered_mean(upload.tiers["root"], upload.images, self.root)
            self.head = self.averaging.mean(upload.head, upload.images, self.head)
        return {}

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        return self.message(self.trained(state, download, trainer), download)

    def trained(self, state: ClientState, download: Download, trainer: Trainer) -> Trained:
        """What n clients make of a round."""
        assert download.blocks is not None
        models, parts = self.models(state, download, trainer), self.parts(download.blocks)
        return trainer.train(models, "root", rates=download.stage.rates, parts=parts)

    def message(self, trained: Trained, download: Download) -> Upload:
        """What they send of it."""
        assert download.blocks is not None
        return replace(trained.upload(), tiers={"root": self.of_blocks(trained.tiers["root"], download.blocks)})

    def personalise(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        assert download.blocks is not None
        models, epochs = self.models(state, download, trainer), self.training.unseen_epochs
        parts = self.parts(download.blocks)
        trained = trainer.train(models, self.own_tier, rates=self.own_rates, epochs=epochs, parts=parts)
        return models.after(trained)
