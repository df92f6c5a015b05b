"""FSLoRA (Fang et al., Federated Sketching LoRA, ICML 2026): one adapter of a high rank, of which each client trains
ranks that are drawn anew each round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hilora.federated.coverage import picked, scattered
from hilora.federated.protocol import Download, Stage, Upload, own, shared
from hilora.federated.strategies.fedit import FedIT
from hilora.federated.streams import stream


class FSLoRA(FedIT):
    """A client's model is `W + B S A`, its sketch S diagonal with k of r entries r/k and the others zero, so that S is
    the identity on the mean. It is sent the k rows of A and columns of B that its sketch selects, the same places in
    all projections, and sends them back. The server draws, so that no places travel.

    The mean of the changes counts all clients of a round, by images, those too that did not have an entry: with r/k
    before the product, that makes the mean step one of the whole adapter. All clients predict with the whole one, and
    an unseen client's own training is of the whole one, too.
    """

    name = "fslora"
    unequal = frozenset({"ranks"})

    def start(self) -> None:
        super().start()
        self.done = 0  # rounds

    def places(self, clients: Tensor) -> Tensor:
        """The ranks in the order in which each of the clients `[n]` draws them this round, int64 `[n, r]`: the first of
        them are its own."""
        draws = [stream(self.training.seed, "sketch", self.done, client) for client in clients.tolist()]
        return torch.stack([torch.randperm(self.root.r, generator=one) for one in draws])

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        ranks = self.problem.budgets.rank(clients, self.root.r)
        root = picked(self.root, self.places(clients), ranks)
        if bool((ranks < self.root.r).any()):
            root = root.scaled(self.root.r / ranks.float())
        return Download(stage, {"root": own(root)}, shared(self.head, clients))

    def serve(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"root": shared(self.root, clients)}, shared(self.head, clients))

    @property
    def sums(self) -> bool:
        return False

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if upload.images.sum() > 0 and upload.head is not None:
            whole = scattered(upload.tiers["root"], self.places(upload.clients), self.root)
            self.root = self.averaging.mean(whole, upload.images, self.root)
            self.head = self.averaging.mean(upload.head, upload.images, self.head)
        self.done += 1
        return {}
