"""Head only: HiLoRA's cascade on the classifier head, without adapters. A reference row, ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.grouping import GroupingSettings
from hilora.federated.protocol import Download, Sends, Stage, Upload, shared
from hilora.federated.strategies.hilora import PROBE, HiLoRA
from hilora.federated.streams import stream


class HeadOnly(HiLoRA):
    """The head is averaged over all, then inside the cluster, then private; adapters that do nothing stand in for
    HiLoRA's, and never leave the client.

    Clusters are found as HiLoRA finds them, from the subspaces that clients change the head's weight in: its leading
    left singular vectors, directions among the classes, stand for the columns of B.
    """

    Settings = GroupingSettings  # type: ignore[assignment]
    settings: GroupingSettings  # type: ignore[assignment]

    name = "head-only"
    own_tier = "root"
    factors = ""
    energy = None
    unequal = frozenset()

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        found = super().configure(stage, clients)
        return Download(stage, {}, found.head)

    def sends(self, stage: Stage) -> Sends:
        return Sends(head=not stage.private)

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if stage.tier == "root":
            return super().aggregate(stage, upload)
        if stage.tier == "cluster":
            heads, member = self.heads["cluster"].each(Tensor.clone), self.grouping.member[upload.clients]
            for group in member.unique():
                members = upload.rows(member == group)
                if members.head is not None and members.images.sum() > 0:
                    heads.put(group[None], self.averaging.mean(members.head, members.images, heads.rows(group[None])))
            self.heads["cluster"] = heads
        return {}

    def averaged(self, upload: Upload, start: AdapterTable) -> AdapterTable:
        return self.root

    def remember(self, upload: Upload) -> None:
        assert upload.head is not None
        change = upload.head.weight - self.heads["root"].weight  # [n, classes, D]
        U, sigma, _ = torch.linalg.svd(change, full_matrices=False)
        B = (U * sigma.unsqueeze(-2))[:, None, :, : self.training.rank["root"]]  # [n, 1, classes, r]
        A = B.new_zeros(*B.shape[:2], B.shape[3], 1)
        server = AdapterTable([A[:1]], [torch.zeros_like(B[:1])])
        self.grouping.remember(upload.clients, AdapterTable([A], [B]), server)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        stage, models = download.stage, self.models(state, download, trainer)
        epochs = 1 if stage == PROBE else None
        trained = trainer.train(models, "root", rates=stage.rates, epochs=epochs, factors=self.factors)
        if stage.tier == "leaf":
            state.put("head", trained.head)
        return trained.upload(head=stage.tier != "leaf")

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        assert download.head is not None
        idle = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters", 0))
        head = state.filled("head", download.head.taken) if download.stage.tier == "leaf" else download.head
        cluster = None if download.stage.tier == "root" else download.head.slot
        return Models({"root": shared(idle, state.clients)}, head, cluster=cluster)

    def personal_training(self) -> dict[str, Any]:
        return {}
