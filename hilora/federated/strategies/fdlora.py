"""FDLoRA (Qi et al., Personalized Federated Learning of Large Language Models via Dual LoRA Tuning, 2024): a personal
and a shared adapter, fused in the end."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hilora.adapters.table import AdapterTable, Stack, Values
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.local.search import evolve
from hilora.federated.protocol import Download, Rows, Sends, Stage, Upload, own, shared
from hilora.federated.settings import Number, Settings, Whole
from hilora.federated.strategies.base import Ask, Strategy, everyone_starts
from hilora.federated.streams import stream

PERSONAL, COLLECT, SHARED, FUSE = "personal", "collect", "shared", "fuse"  # what clients are asked to do


class FDLoRA(Strategy):
    """Three stages:

    1. In the rounds of the root tier, each client trains its personal adapter by itself.
    2. The shared adapter starts as their mean. In each round clients train it for `inner_epochs`, and the server takes
       a Nesterov step along the mean change. Every `sync` rounds a client's personal adapter becomes the shared one as
       it has just trained it.
    3. In the last round each client fuses the two, `(w1 B_p + w2 B_s)(w1 A_p + w2 A_s)`, with weights that a
       gradient-free search finds on a few of its training images, under an L1 penalty.

    Left open, ours: all personal adapters begin alike, or their mean would be of different bases, and small. The head
    belongs to the adapter it is trained with, and is fused with the same weights. The search is a (1+1) evolution
    strategy from (0.5, 0.5), its steps widened after a success and narrowed after a failure. The outer rate and
    momentum are those of DiLoCo (0.7, 0.9), which the method follows.
    """

    class Settings(Settings):
        inner_epochs: Whole = Field(3, ge=1, description="local epochs of the shared adapter, times local_epochs")
        sync: Whole = Field(5, ge=1, description="rounds after which the personal adapter becomes the shared one")
        outer_lr: Number = Field(0.7, gt=0, description="learning rate of the server's Nesterov steps")
        momentum: Number = Field(0.9, ge=0, lt=1, description="of the server's Nesterov steps")
        images: Whole = Field(16, ge=1, description="training images that fusion weights are tried on")
        evaluations: Whole = Field(20, ge=1, description="fusion weights that are tried")
        l1: Number = Field(0.05, ge=0, description="weight of the L1 penalty on the fusion weights")

    name = "fdlora"
    tiers = ("root", "leaf")
    settings: Settings

    def start(self) -> None:
        self.root, self.head = self._first(), self.problem.head
        self.velocity: dict[str, dict[str, Tensor]] = {}

    def _first(self) -> AdapterTable:
        """The personal adapter that all begin with."""
        return self.problem.fresh("leaf", 1, stream(self.training.seed, "fresh adapters"))

    def stages(self) -> list[Stage]:
        first, fusion = self.training.rounds["root"], min(1, self.total_rounds() - self.training.rounds["root"])
        return [
            Stage("leaf", first, "root", PERSONAL, private=True),
            Stage("root", self.total_rounds() - first - fusion, "root", SHARED),
            Stage("leaf", fusion, "leaf", FUSE, private=True),
        ]

    def begin(self, stage: Stage, clients: Tensor, ask: Ask) -> None:
        if stage.task == SHARED:
            upload = ask(clients, Download(stage._replace(task=COLLECT)))
            assert upload.head is not None
            self.root = self.averaging.mean(upload.tiers["leaf"], upload.images, self._first())
            self.head = self.averaging.mean(upload.head, upload.images, self.problem.head)

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        if stage.task == PERSONAL:
            return Download(stage)
        return Download(stage, {"root": shared(self.root, clients)}, shared(self.head, clients))

    def sends(self, stage: Stage) -> Sends:
        if stage.task == COLLECT:
            return Sends({"leaf": "AB"}, head=True)
        return Sends({"root": "AB"}, head=True) if stage.task == SHARED else Sends()

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if stage.task == SHARED and upload.head is not None and upload.images.sum() > 0:
            root = self.averaging.mean(upload.tiers["root"], upload.images, self.root)
            head = self.averaging.mean(upload.head, upload.images, self.head)
            self.root, self.head = self._stepped("adapters", self.root, root), self._stepped("head", self.head, head)
        return {}

    def _stepped(self, name: str, current: Any, reached: Stack) -> Any:
        """A Nesterov step of the server towards what the clients reached."""
        momentum, rate, found = self.settings.momentum, self.settings.outer_lr, current.tensors()
        velocities = self.velocity.setdefault(name, {})
        for key, goal in reached.tensors().items():
            if goal.is_floating_point():
                slope = found[key] - goal
                velocities[key] = momentum * velocities.get(key, torch.zeros_like(slope)) + slope
                found[key] = found[key] - rate * (slope + momentum * velocities[key])
        return current.like(found)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        stage = download.stage
        if stage.task == COLLECT:
            models = self._personal(state)
            return Upload(state.clients, trainer.counts, {"leaf": models.tiers["leaf"].taken()}, models.head.taken())
        if stage.task == FUSE:
            state.put("weights", Values(fusion=self._search(state, download, trainer)))
            return Upload(state.clients, trainer.counts)
        if stage.task == PERSONAL:
            trained = trainer.train(self._personal(state), "leaf", rates=stage.rates)
            self._keep(state, trained.tiers["leaf"], trained.head)
            return trained.upload(head=False)
        epochs = self.settings.inner_epochs * self.training.local_epochs
        trained = trainer.train(self._shared(download), "root", rates=stage.rates, epochs=epochs)
        if download.round % self.settings.sync == 0:
            self._keep(state, trained.tiers["root"], trained.head)
        return trained.upload("root")

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        if download.stage.task == PERSONAL:
            return self._personal(state)
        if download.stage.task == SHARED:
            return self._shared(download)
        newcomers = ~state.has("leaf")  # who never trained a personal adapter take the shared one as it is
        first = torch.where(newcomers[:, None], torch.tensor([0.0, 1.0]), 0.5)
        weights = state.filled("weights", lambda: Values(fusion=first)).taken()
        return self._fused(state, download, weights["fusion"])

    def personalise(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        """A newcomer trains a personal adapter from the shared one, and fuses the two."""
        personal = self._own_or_shared(state, download)
        trained = trainer.train(personal, "leaf", rates="leaf", epochs=self.training.unseen_epochs)
        self._keep(state, trained.tiers["leaf"], trained.head)
        return self._fused(state, download, self._search(state, download, trainer))

    def _keep(self, state: ClientState, adapters: AdapterTable, head: Stack) -> None:
        state.put("leaf", adapters)
        state.put("head", head)

    def _personal(self, state: ClientState) -> Models:
        count = len(state.clients)
        leaf = state.filled("leaf", everyone_starts(self._first(), count))
        return Models({"leaf": leaf}, state.filled("head", everyone_starts(self.problem.head, count)))

    def _shared(self, download: Download) -> Models:
        assert download.head is not None
        return Models(download.tiers, download.head)

    def _own_or_shared(self, state: ClientState, download: Download) -> Models:
        """A client's personal adapter and head; the shared ones, for a newcomer."""
        assert download.head is not None
        leaf: Rows[Any] = state.filled("leaf", download.tiers["root"].taken)
        return Models({"leaf": leaf}, state.filled("head", download.head.taken))

    def _fused(self, state: ClientState, download: Download, weights: Tensor) -> Models:
        personal, common = self._own_or_shared(state, download), self._shared(download)

        def fused(mine: Any, theirs: Any) -> Any:
            rows, others = mine.tensors(), theirs.tensors()
            for name, value in rows.items():
                if value.is_floating_point():
                    first, second = weights.to(value).view(-1, 2, *[1] * (value.dim() - 1)).unbind(1)
                    rows[name] = first * value + second * others[name]
            return own(mine.like(rows))

        leaf = fused(personal.tiers["leaf"].taken(), common.tiers["root"].taken())
        return Models({"leaf": leaf}, fused(personal.head.taken(), common.head.taken()))

    def _search(self, state: ClientState, download: Download, trainer: Trainer) -> Tensor:
        """The weights `[n, 2]` of the lowest loss plus L1 penalty found for each client."""
        images = trainer.examples(self.settings.images)

        def objective(weights: Tensor) -> Tensor:
            models = self._fused(state, download, weights)
            return trainer.scores(models, images).loss + self.settings.l1 * weights.abs().sum(1)

        start, draws = torch.full((len(state.clients), 2), 0.5), stream(self.training.seed, "fusion")
        return evolve(objective, start, self.settings.evaluations, draws)
