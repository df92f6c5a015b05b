"""Fed-HeLLo (Zhang et al., Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA Allocation, TNNLS
2025): each client trains the adapters of some blocks, more often those of blocks that matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hilora.federated.client import ClientState
from hilora.federated.engine.blocks import Parts
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Sends, Stage, Upload
from hilora.federated.settings import Settings, Whole
from hilora.federated.strategies.some_blocks import SomeBlocks
from hilora.federated.streams import stream

THIRDS = {"uniform": (1, 1, 1), "triangle": (3, 2, 1), "inverted": (1, 2, 3)}


class FedHeLLo(SomeBlocks):
    """All adapters take part in a client's forward pass, those that it does not train as they are.

    Each client draws as many blocks as its budget has, without replacement, by weights of 3, 2 and 1 (the authors'
    1/9, 2/27 and 1/27): by a pattern over the depth, or by the Fisher information of each block's adapters. Clients
    measure that on a few of their own training images, in the first round and every `refresh` rounds, after they have
    trained (before the first training a head of zeros has no gradients for adapters), and send a number for each block;
    the weights hold until the next time. (In the authors' code the server measures it on images of its
    own, draws by it in the one round, and by the pattern in all others.) The third of the blocks with the highest
    values has the weight 3; the authors cut into thirds by k-means, whose groups may be of any size.
    """

    class Settings(Settings):
        pattern: Literal["uniform", "triangle", "inverted", "bottleneck"] = Field(
            "bottleneck",
            description="which blocks are drawn most: all alike, the first ones, the last ones, or those at both ends",
        )
        allocation: Literal["pattern", "fisher"] = Field(
            "pattern", description="what blocks are drawn by; fisher takes the pattern until it is measured"
        )
        refresh: Whole = Field(
            10, ge=1, description="rounds from one measurement of the Fisher information to the next"
        )
        fisher_images: Whole = Field(4, ge=1, description="of a client, which it is measured on")

    name = "fed-hello"
    settings: Settings

    def start(self) -> None:
        super().start()
        self.weights = pattern(self.settings.pattern, self.problem.depth)

    def drawn(self, clients: Tensor) -> Tensor:
        found = torch.zeros(len(clients), self.problem.depth, dtype=torch.bool)
        for row, client, budget in zip(found, clients.tolist(), self.budget(clients).tolist(), strict=True):
            draws = stream(self.training.seed, "blocks", self.done, client)
            row[torch.multinomial(self.weights, budget, generator=draws)] = True
        return found

    def parts(self, blocks: Tensor) -> Parts:
        return Parts(blocks)

    def sends(self, stage: Stage) -> Sends:
        scores = self.problem.depth if self.settings.allocation == "fisher" else 0
        return super().sends(stage)._replace(scores=scores)

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        scores = upload.scores
        if scores is not None and (worked := scores.sum(1) > 0).any():
            self.weights = by_importance(scores[worked].double().mean(0))
        return super().aggregate(stage, upload)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        trained = self.trained(state, download, trainer)
        upload = self.message(trained, download)
        if self.settings.allocation != "fisher":
            return upload
        scores = torch.zeros(len(upload.clients), self.problem.depth, dtype=torch.float32)
        if (download.round - 1) % self.settings.refresh == 0:
            models = self.models(state, download, trainer).after(trained)
            scores = trainer.fisher(models, "root", self.settings.fisher_images)
        return replace(upload, scores=scores)


def pattern(name: str, depth: int) -> Tensor:
    """How often each of L blocks is drawn, relatively: `[L]`. The bottleneck is the authors' 3, 3, 3, 2, 2, 1, … made
    symmetric."""
    place = (torch.arange(depth) + 0.5) / depth
    if name == "bottleneck":
        to_end = 0.5 - (place - 0.5).abs()
        return 1.0 + (to_end < 5 / 12) + (to_end < 1 / 4)
    return torch.tensor(THIRDS[name], dtype=torch.float32)[(place * 3).long()]


def by_importance(values: Tensor) -> Tensor:
    """The weights of L blocks by how much they matter, `[L]`: 3 for the highest third, then 2, then 1."""
    return pattern("inverted", len(values))[values.argsort().argsort()]
