"""FLoRA (Wang et al., Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, NeurIPS
2024): clients' adapters are stacked, merged into the base model, and new ones begun."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.table import AdapterTable, Stack
from hilora.algorithms.aggregation import product_space_mean, relative_change
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Part, Stage, Upload, own, shared
from hilora.federated.settings import Settings, TrainingSettings, Whole
from hilora.federated.strategies.base import Strategy
from hilora.federated.streams import stream


class FLoRA(Strategy):
    """In each round a client begins a random A and a B of zeros of its own, of any rank, and trains and sends them with
    the head. The server stacks them, the rows of A under each other and the columns of B side by side, so that

        W ← W + Σ π_i B_i A_i

    is exact. It sends the stack to all, who merge it into their base model and begin anew.

    Here all clients share one frozen base. What has been merged so far is a tier on top of it, kept exactly by a QR
    decomposition and an SVD, until it has as many ranks as there is room for: beyond, the smallest singular values are
    cut, and a round notes the share of the norm that this cost (`cut`). With room for the shorter side of the layers
    nothing ever is: for a width of 192 and a rank of 8, `room = 24`.

    The traffic is counted as the method's own: a client is sent the stack of every round that it has not merged yet,
    N r ranks each, and not the tier. It grows with the clients. A tier is scaled by lora_alpha / rank of the root for
    all clients, whatever their budgets of ranks.

    Left open for ViTs, ours: the head is averaged. An unseen client trains an adapter on top of what was merged.
    """

    class Settings(Settings):
        room: Whole = Field(8, ge=1, description="ranks that merged updates can have, in ranks of an adapter")

    name = "flora"
    tiers = ("root", "leaf")
    unequal = frozenset({"ranks"})
    merged = frozenset({"root"})
    settings: Settings

    def adapters(self, training: TrainingSettings) -> HiLoRAConfig:
        rank, alpha, room = training.rank["root"], training.lora_alpha["root"], self.settings.room
        r, alphas = {"root": room * rank, "leaf": rank}, {"root": room * alpha, "leaf": alpha}
        return replace(super().adapters(training), r=r, lora_alpha=alphas)

    def most_ranks(self, training: TrainingSettings) -> int:
        return training.rank["root"]

    def start(self) -> None:
        empty = self.problem.fresh("leaf", 1, torch.Generator()).leading(torch.tensor([0]))
        self.root = empty.resized(self.adapters(self.training).rank("root"))
        self.head = self.problem.head
        self.stacked: list[int] = []  # bytes of the stack of each round

    def stages(self) -> list[Stage]:
        return [Stage("leaf", self.total_rounds(), "root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        root, head = shared(self.root, clients), shared(self.head, clients)
        return Stacks(stage, {"root": root}, head, stacked=tuple(self.stacked))

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        worked = upload.rows(upload.images > 0)
        if not len(worked.clients) or worked.head is None:
            return {}
        sent = worked.tiers["leaf"]
        self.stacked.append(int(sent.nbytes().sum()))
        self.head = self.averaging.mean(worked.head, worked.images, self.head)
        new = self.averaging.products(sent, worked.images, sent.each(torch.zeros_like))
        merged = self.root.resized(int(self.root.rank))
        together = [
            (torch.cat([A, more_A], -2), torch.cat([B, more_B], -1))
            for (A, B), (more_A, more_B) in zip(merged.factors, new, strict=True)
        ]
        self.root = compressed(together, self.root.r)
        return {"cut": relative_change(self.root.factors, together)}

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        models = self.with_fresh(state, download, trainer)
        return trainer.train(models, "leaf", rates=download.stage.rates).upload("leaf")

    def with_fresh(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        """What n clients predict with, and an adapter that each begins on top of it."""
        models = self.models(state, download, trainer)
        generator = stream(self.training.seed, "fresh adapters", download.round)
        fresh = self.problem.fresh("leaf", self.problem.clients, generator, state.clients)
        leaf = self.fitted(own(fresh), state.clients).taken()
        return replace(models, tiers={**models.tiers, "leaf": own(leaf)})

    def personalise(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        models = self.with_fresh(state, download, trainer)
        epochs = self.training.unseen_epochs
        return models.after(trainer.train(models, "leaf", rates=self.own_rates, epochs=epochs))


def compressed(factors: list[tuple[Tensor, Tensor]], room: int) -> AdapterTable:
    """One row of products as a table with so much room, of the rank that they can have at most; exact, if that is no
    more.

    Args:
        factors: for each shape of projection A `[1, P, R, in]` and B `[1, P, out, R]`.
        room: ranks of the table.
    """
    A, B, used = [], [], 0
    for wide_A, wide_B in factors:
        rank = min(room, wide_A.shape[-2], wide_A.shape[-1], wide_B.shape[-2])
        new_A, new_B = product_space_mean(wide_A, wide_B, torch.ones(1), rank)
        A.append(F.pad(new_A, (0, 0, 0, room - rank))[None])
        B.append(F.pad(new_B, (0, room - rank))[None])
        used = max(used, rank)
    return AdapterTable(A, B, torch.tensor([used]))


@dataclass(frozen=True)
class Stacks(Download):
    """A download of the merged tier, counted as what the method sends in its place: the stack of each round.

    Attributes:
        stacked: bytes of each round's.
    """

    stacked: tuple[int, ...] = ()

    def counted(self) -> Iterator[Part]:
        for part in self.parts():
            if not part.name.startswith("root."):
                yield part
        assert self.head is not None
        for number, weight in enumerate(self.stacked):
            yield Part(f"stack.{number}", Weight(number, weight), torch.zeros_like(self.head.slot))


class Weight(Stack):
    """What stands for a round's stack: its number and its bytes."""

    def __init__(self, number: int, weight: int) -> None:
        self.number, self.weight = number, weight

    def tensors(self) -> dict[str, Tensor]:
        return {"stack": torch.tensor([[self.number, self.weight]])}

    def like(self, tensors: dict[str, Tensor]) -> Weight:
        number, weight = tensors["stack"][0].tolist()
        return Weight(number, weight)

    def nbytes(self) -> Tensor:
        return torch.tensor([self.weight])
