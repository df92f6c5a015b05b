"""Head only: HiLoRA's cascade on the classifier head, without adapters. A reference row, ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hilora.federated.engine.state import Models, State, Table, Trained, one_for_all, size
from hilora.federated.engine.work import Work
from hilora.federated.settings import RunConfig
from hilora.federated.strategies.base import Stage, Traffic
from hilora.federated.strategies.hilora import HiLoRA


class HeadOnly(HiLoRA):
    """The head is averaged over all, then inside the cluster, then private; the adapters never leave zero.

    Clusters are found as HiLoRA finds them, from the subspaces that clients change the head's weight in: its leading
    left singular vectors, directions among the classes, stand for the columns of B.
    """

    own_tier = "root"
    factors = ""

    @classmethod
    def adapted(cls, run: RunConfig) -> RunConfig:
        return replace(super().adapted(run), gamma_root=0.0, gamma_cluster=0.0, head="follow")

    def models(self, clients: Tensor) -> Models:
        return Models(
            {"root": one_for_all(self.root, clients)}, Table(self.heads[self.stage], self._slots(clients)[self.stage])
        )

    def round(self, stage: Stage, clients: Tensor, work: Work) -> dict[str, Any]:
        trained = work.train(clients, self.models(clients), "root", rates=stage.rates, factors=self.factors)
        return self.aggregate(stage.tier, clients, trained)

    def traffic(self, tier: str) -> Traffic:
        numbers = 0 if tier == "leaf" else size(self.heads["root"])
        return Traffic(numbers, numbers)

    def _averaged(self, trained: Trained) -> State:
        return {name: value[:1] for name, value in trained.adapters.items()}  # all alike

    def _remember(self, clients: Tensor, trained: Trained) -> None:
        change = trained.head["weight"] - self.heads["root"]["weight"]  # [n, classes, D]
        U, sigma, _ = torch.linalg.svd(change, full_matrices=False)
        B = (U * sigma.unsqueeze(-2))[:, None, :, : self.run.rank["root"]]  # [n, 1, classes, r]
        A = B.new_zeros(*B.shape[:2], B.shape[3], 1)
        self.grouping.remember(clients, {"A0": A, "B0": B}, {"A0": A[:1], "B0": torch.zeros_like(B[:1])})
