"""A bilevel problem: one tier is trained through a step of another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hilora.federated.engine.bench import Bench, LocalAlgorithm, Training
from hilora.federated.local.sgd import SGDTraining
from hilora.kernels import twice_differentiable


@dataclass(frozen=True)
class Bilevel(LocalAlgorithm):
    """`lower` takes a step of SGD on a client's loss, the tier in training then one of AdamW on the loss after that
    step, with the exact gradient through it:

        y' = y − α ∂f(x, y)/∂y        x ← AdamW(d f(x, y'(x)) / dx)        y ← y'

    The schedule is that of AdamW's rates alone; there is no penalty.

    Attributes:
        lower: the tier of y.
        lr: α.
    """

    lower: str
    lr: float

    @property
    def more_tiers(self) -> tuple[str, ...]:
        return (self.lower,)

    def training(self, bench: Bench) -> Training:
        return _BilevelTraining(bench, self)


class _BilevelTraining(SGDTraining):
    def __init__(self, bench: Bench, problem: Bilevel) -> None:
        super().__init__(bench)
        self.lower = bench.factors(problem.lower, "AB", problem.lr)

    def _step(self) -> None:
        values = [slotted.parameter for slotted in self.lower]
        with twice_differentiable(), sdpa_kernel(SDPBackend.MATH):
            before = self._task(self.bench.predict(self.pixels))
            slopes = torch.autograd.grad(before.sum(), values, create_graph=True)
            moved = [v - one.lr * slope for v, one, slope in zip(values, self.lower, slopes, strict=True)]
            with self.bench.holding({id(value): new for value, new in zip(values, moved, strict=True)}):
                task = self._task(self.bench.predict(self.pixels))
            gradients = torch.autograd.grad(task.sum(), [slotted.parameter for slotted in self.bench.trained])
        with torch.no_grad():
            for value, new in zip(values, moved, strict=True):
                value.copy_(new)
        self._update(task, gradients)
