"""FedOPAL (Tupper & Gagné, Personalized Federated Fine-Tuning of Vision Foundation Models for Healthcare, 2025): a
global and a personal adapter, trained at once and kept orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hilora.federated.client import ClientState
from hilora.federated.engine.bench import Bench, Training
from hilora.federated.engine.optim import Slotted
from hilora.federated.engine.trainer import Trainer
from hilora.federated.local.sgd import LocalSGD, SGDTraining
from hilora.federated.protocol import Download, Upload
from hilora.federated.settings import Number
from hilora.federated.strategies.own_adapter import OwnAdapter


class FedOPAL(OwnAdapter):
    """`y = W0 x + B_g A_g x + B_p A_p x`. A client trains both adapters and its head in the same steps, on

        task loss + γ Σ_P ‖B_gᵀ B_p‖²_F

    over all projections P; the penalty moves both adapters. (A_g, B_g) is sent and averaged, (A_p, B_p) stays with the
    client.

    The paper has a penalty on the adapters' weights and one on their outputs. This is the one on weights; that it is on
    the column spaces of B, as in HiLoRA's loss, so that the two methods compare, is ours. Left open, ours: the head is
    private, unless `shared_head` says otherwise. An unseen client trains its personal adapter and its head under the
    global adapter as it is, and then the penalty moves these alone.
    """

    class Settings(OwnAdapter.Settings):
        orthogonality: Number = Field(0.1, ge=0, description="γ, weight of the overlap of both adapters")

    name = "fedopal"
    settings: Settings

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        rates = download.stage.rates
        apart = KeptApart(also=("leaf",), rates=rates, weight=self.settings.orthogonality, tiers=("root", "leaf"))
        trained = trainer.train(self.models(state, download, trainer), "root", algorithm=apart, rates=rates)
        return self.keep(state, trained)

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
