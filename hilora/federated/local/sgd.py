"""Local SGD, here with AdamW: what the clients of nearly every method do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hilora.federated.engine.bench import Bench, LocalAlgorithm, Training
from hilora.federated.engine.graph import Replay
from hilora.federated.engine.optim import SlotAdamW, Slotted


@dataclass(frozen=True)
class LocalSGD(LocalAlgorithm):
    """Mini-batch steps of AdamW on the cross entropy and the penalty.

    Attributes:
        also: tiers whose adapters are trained in the same steps as the one that is asked for.
        rates: the tier whose learning rate these take.
    """

    also: tuple[str, ...] = ()
    rates: str = "leaf"

    @property
    def more_tiers(self) -> tuple[str, ...]:
        return self.also

    def training(self, bench: Bench) -> Training:
        rate = bench.settings.lr[self.rates]
        return SGDTraining(bench, [one for tier in self.also for one in bench.factors(tier, "AB", rate)])


class SGDTraining(Training):
    """Steps on tensors that stay in place, so that a GPU can replay them as a graph."""

    def __init__(self, bench: Bench, also: Sequence[Slotted] = ()) -> None:
        settings, (clients, batch) = bench.settings, bench.pixels.shape[:2]
        self.bench, self.schedule = bench, settings.schedule
        self.trained = [slotted.parameter for slotted in (*bench.trained, *also)]
        self.optimiser = SlotAdamW([*bench.trained, *also], clients, settings.weight_decay, settings.clip_norm)
        self.pixels, device = bench.pixels, bench.pixels.device
        self.target = torch.full((clients, batch), -1, device=device)  # -1 where a client has no more images
        self.loss = torch.zeros(clients, device=device)
        self.total = torch.ones(clients, dtype=torch.float64, device=device)
        self.run = Replay(self._step, device)

    def begin(self, total: Tensor) -> None:
        self.optimiser.reset()
        self.loss.zero_()
        self.total.copy_(total.clamp_min(1))

    def step(self, pixels: Tensor, target: Tensor) -> None:
        """As `Training.step`. Clients without an image stay as they are; `loss` adds up the others' mean losses."""
        self.pixels.copy_(pixels)
        self.target.copy_(target)
        self.run()

    def _step(self) -> None:
        task = self._task(self.bench.predict(self.pixels))
        total = (task + self.bench.penalty()).sum()
        self._update(task, torch.autograd.grad(total, self.trained))

    def _task(self, logits: Tensor) -> Tensor:
        """The clients' mean cross entropies `[G]` from logits `[G, b, classes]`; 0 for one without images."""
        losses = F.cross_entropy(logits.flatten(0, 1), self.target.flatten(), ignore_index=-1, reduction="none")
        return losses.view(self.target.shape).sum(1) / (self.target >= 0).sum(1).clamp_min(1)

    def _update(self, task: Tensor, gradients: Sequence[Tensor]) -> None:
        takes_part = (self.target >= 0).any(1)
        self.optimiser.step(gradients, takes_part, self._rate())
        self.loss += task.detach() * takes_part

    def _rate(self) -> Tensor | None:
        """The share `[G]` of the learning rate in the coming step."""
        if self.schedule == "constant":
            return None
        done = (self.optimiser.steps / self.total).clamp_max(1)
        return 1 - done if self.schedule == "linear" else (1 + torch.cos(math.pi * done)) / 2
