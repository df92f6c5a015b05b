"""IFCA (Ghosh et al., An Efficient Framework for Clustered Federated Learning, 2020) with adapters. A reference row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hilora.adapters.table import Values
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Head, Rows, Sends, Stage, Upload
from hilora.federated.settings import Settings, Whole
from hilora.federated.strategies.base import Strategy
from hilora.federated.streams import stream


class IFCA(Strategy):
    """K global adapters and heads; a client takes the ones with the lowest loss on its training images, trains them,
    and each is averaged over those who took it.

    Fresh adapters have no effect, and a head of zeros gives every model one loss: the K heads start at random instead,
    as `nn.Linear` does, and clients choose from the start. The losses are those of `images` of a client's training
    images, a mini-batch, as the paper allows.
    """

    class Settings(Settings):
        k: Whole = Field(5, ge=1, description="number of global adapters")
        images: Whole = Field(32, ge=1, description="training images that a client chooses by")

    name = "ifca"
    tiers = ("root",)
    own_tier = "root"
    settings: Settings

    def start(self) -> None:
        k = self.settings.k
        self.root = self.problem.fresh("root", k, stream(self.training.seed, "fresh adapters"))
        first = self.problem.head
        generator, bound = stream(self.training.seed, "first heads"), first.weight.shape[-1] ** -0.5
        drawn = {
            name: torch.empty(k, *value.shape[1:]).uniform_(-bound, bound, generator=generator).to(value)
            for name, value in first.tensors().items()
        }
        self.head = Head(**drawn)

    def stages(self) -> list[Stage]:
        return [Stage("root", self.total_rounds(), "root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        all_of_them = torch.arange(self.settings.k).expand(len(clients), -1)
        return Download(stage, {"root": Rows(self.root, all_of_them)}, Rows(self.head, all_of_them))

    def sends(self, stage: Stage) -> Sends:
        return Sends({"root": "AB"}, head=True, choices=self.settings.k)

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        assert upload.choice is not None
        root, head = self.root.each(Tensor.clone), self.head.each(Tensor.clone)
        for group in upload.choice.unique():
            members = upload.rows(upload.choice == group)
            if members.head is not None and members.images.sum() > 0:
                for table, sent in ((root, members.tiers["root"]), (head, members.head)):
                    table.put(group[None], self.averaging.mean(sent, members.images, table.rows(group[None])))
        self.root, self.head = root, head
        return {}

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        models = self.models(state, download, trainer)
        trained = trainer.train(models, "root", rates=download.stage.rates)
        return replace(trained.upload("root"), choice=models.cluster)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        assert download.head is not None
        choice = self._choice(state, download, trainer)
        tiers = {"root": download.tiers["root"].picked(choice)}
        return Models(tiers, download.head.picked(choice), cluster=choice)

    def _choice(self, state: ClientState, download: Download, trainer: Trainer) -> Tensor:
        """The adapter and head of the lowest loss for each client, int64 `[n]`; remembered for a round."""
        now = Values(
            choice=torch.zeros(len(state.clients), dtype=torch.long), round=torch.full((len(state.clients),), -1)
        )
        known = state.filled("choice", lambda: now).taken()
        if (known["round"] == download.round).all():
            remembered: Tensor = known["choice"]
            return remembered
        assert download.head is not None
        images = trainer.examples(self.settings.images)
        losses = []
        for k in range(self.settings.k):
            one = torch.full((len(state.clients),), k)
            models = Models({"root": download.tiers["root"].picked(one)}, download.head.picked(one))
            losses.append(trainer.scores(models, images).loss)
        choice = torch.stack(losses).argmin(0)
        state.put("choice", Values(choice=choice, round=torch.full_like(choice, download.round)))
        return choice
