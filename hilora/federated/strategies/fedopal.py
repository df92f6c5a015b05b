"""FedOPAL (Tupper & Gagné, Personalized Federated Fine-Tuning of Vision Foundation Models for Healthcare, 2025): a
global and a personal adapter, trained at once and kept orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.bench import Bench, Training
from hilora.federated.engine.optim import Slotted
from hilora.federated.engine.trainer import Trainer
from hilora.federated.local.sgd import LocalSGD, SGDTraining
from hilora.federated.protocol import Download, Sends, Stage, Upload, shared
from hilora.federated.settings import Number
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.streams import stream


class FedOPAL(SharableHead):
    """`y = W0 x + B_g A_g x + B_p A_p x`. A client trains both adapters and its head in the same steps, on

        task loss + γ Σ_P ‖B_gᵀ B_p‖²_F

    over all projections P; the penalty moves both adapters. (A_g, B_g) is sent and averaged, (A_p, B_p) stays with the
    client.

    The paper has a penalty on the adapters' weights and one on their outputs. This is the one on weights; that it is on
    the column spaces of B, as in HiLoRA's loss, so that the two methods compare, is ours. Left open, ours: the head is
    private, unless `shared_head` says otherwise. An unseen client trains its personal adapter and its head under the
    global adapter as it is, and then the penalty moves these alone.
    """

    class Settings(SharableHead.Settings):
        orthogonality: Number = Field(0.1, ge=0, description="γ, weight of the overlap of both adapters")

    name = "fedopal"
    tiers = ("root", "leaf")
    settings: Settings

    def start(self) -> None:
        super().start()
        self.root = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters", 0))

    def stages(self) -> list[Stage]:
        return [Stage("root", self.total_rounds(), "root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"root": shared(self.root, clients)}, self.sent_head(clients))

    def sends(self, stage: Stage) -> Sends:
        return Sends({"root": "AB"}, head=self.shares_head)

    @property
    def sums(self) -> bool:
        return True

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        self.average_heads(upload)
        if upload.images.sum() > 0:
            self.root = self.averaging.mean(upload.tiers["root"], upload.images, self.root)
        return {}

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        rates = download.stage.rates
        apart = KeptApart(also=("leaf",), rates=rates, weight=self.settings.orthogonality, tiers=("root", "leaf"))
        trained = trainer.train(self.models(state, download, trainer), "root", algorithm=apart, rates=rates)
        state.put("leaf", trained.tiers["leaf"])
        self.keep_heads(state, trained)
        return trained.upload("root", head=self.shares_head)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        leaf = state.filled("leaf", lambda: self.first(state.clients))
        return Models({"root": download.tiers["root"], "leaf": leaf}, self.heads(state, download))

    def first(self, clients: Tensor) -> AdapterTable:
        """The personal adapters that clients begin with."""
        draws = stream(self.training.seed, "fresh adapters", 1)
        return self.problem.fresh("leaf", self.problem.clients, draws, clients)

    def personal_training(self) -> dict[str, Any]:
        weight = self.settings.orthogonality
        return {"penalty": {"root": weight} if weight else {}}


@dataclass(frozen=True)
class KeptApart(LocalSGD):
    """Local SGD with a penalty on the overlap of two tiers in training, which moves both.

    Attributes:
        weight: γ.
        tiers: the two.
    """

    weight: float = 0.0
    tiers: tuple[str, str] = ("root", "leaf")

    def training(self, bench: Bench) -> Training:
        rate = bench.settings.lr[self.rates]
        also = [slotted for tier in self.also for slotted in bench.factors(tier, "AB", rate)]
        pairs = zip(*([one.parameter for one in bench.factors(tier, "B", rate)] for tier in self.tiers), strict=True)
        return _Apart(bench, also, self.weight, list(pairs))


class _Apart(SGDTraining):
    """Steps on the loss and `weight · Σ ‖Bᵀ B'‖²_F` over pairs of B `[P, G, out, r]`."""

    def __init__(
        self, bench: Bench, also: Sequence[Slotted], weight: float, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self.weight, self.pairs = weight, pairs
        super().__init__(bench, also)

    def _step(self) -> None:
        task = self._task(self.bench.predict(self.pixels))
        overlap = sum((B.mT @ other).square().sum((0, 2, 3)) for B, other in self.pairs)
        total = (task + self.bench.penalty() + self.weight * overlap).sum()
        self._update(task, torch.autograd.grad(total, self.trained))
