"""HetLoRA (Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024):
clients hold the first ranks of one adapter, and give up ranks that they have no use for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.algorithms.aggregation import product_norms
from hilora.federated.client import ClientState
from hilora.federated.engine.trainer import Trainer
from hilora.federated.local.pruning import TailPenalty, kept, tails
from hilora.federated.protocol import Download, Stage, Upload, fitted, shared
from hilora.federated.settings import Number, Settings
from hilora.federated.strategies.fedit import FedIT


class HetLoRA(FedIT):
    """The server's adapter is cut to a client's ranks; what comes back is filled up with zeros and averaged.

    - *Weights*: the norm `‖B_i A_i‖_F` of a client's product over all projections, divided by the sum of all norms of
      the round. Zeros count: rank j of the mean is that of the clients that have it times their share of the norms. A
      rank that no client of the round has stays as it was (ours; a mean of zeros would end its training for good). The
      rules of `robust` count all clients alike, and the norms not at all.
    - *Self-pruning*: a client of k ranks trains with a penalty on those beyond γk (`local.pruning`). If they weigh less
      after the training than before, it gives them up: it sends ⌊γk⌋ ranks, and holds no more from then on.

    The head is averaged by images. A tier is scaled by lora_alpha / rank for all clients.
    """

    class Settings(Settings):
        prune_decay: Number = Field(
            0.99,
            gt=0,
            le=1,
            description="γ: the share of its ranks that a client keeps when it prunes; 1: it never does",
        )
        prune_weight: Number = Field(1e-2, ge=0, description="λ: weight of the penalty on the ranks beyond")

    name = "hetlora"
    unequal = frozenset({"ranks"})
    settings: Settings

    def start(self) -> None:
        super().start()
        self.held = self.problem.budgets.rank(torch.arange(self.problem.clients), self.root.r)

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        root = fitted(shared(self.root, clients), self.held[clients])
        return Download(stage, {"root": root}, shared(self.head, clients))

    @property
    def sums(self) -> bool:
        return False

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        worked = upload.rows(upload.images > 0)
        if not len(worked.clients) or worked.head is None:
            return {}
        table = worked.tiers["root"]
        self.held = self.held.clone()
        self.held[worked.clients] = torch.minimum(self.held[worked.clients], table.rank)
        norms = product_norms(table.factors).cpu()
        plain = self.training.robust == "none" and bool(norms.any())
        mean = table.mean(norms) if plain else self.averaging.covered_mean(table, worked.images, self.root)
        self.root = _with_the_rest(mean, self.root, int(table.rank.max()))
        self.head = self.averaging.mean(worked.head, worked.images, self.head)
        return {"ranks": float(self.held[worked.clients].double().mean())}

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        decay, models = self.settings.prune_decay, self.models(state, download, trainer)
        penalty = TailPenalty("root", decay, self.settings.prune_weight)
        trained = trainer.train(models, "root", rates=download.stage.rates, algorithm=penalty if decay < 1 else None)
        after = trained.tiers["root"]
        gives_up = (tails(after, decay) < tails(models.tiers["root"].taken(), decay)).cpu()
        sent = after.leading(kept(after.rank, decay).where(gives_up, after.rank))
        return replace(trained.upload(), tiers={"root": sent})


def _with_the_rest(mean: AdapterTable, before: AdapterTable, covered: int) -> AdapterTable:
    """The first ranks of one adapter and those beyond of another."""
    first = before.leading(torch.tensor([covered]))
    A = [a + (old - cut).to(a) for a, old, cut in zip(mean.A, before.A, first.A, strict=True)]
    B = [b + (old - cut).to(b) for b, old, cut in zip(mean.B, before.B, first.B, strict=True)]
    return AdapterTable(A, B)
