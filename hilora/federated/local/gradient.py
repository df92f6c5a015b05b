"""A gradient in place of a training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hilora.federated.engine.bench import Bench, LocalAlgorithm
from hilora.federated.local.sgd import SGDTraining


@dataclass(frozen=True)
class OneGradient(LocalAlgorithm):
    """What was to be trained becomes its gradient of the cross entropy; for clients with one batch of images each."""

    def training(self, bench: Bench) -> SGDTraining:
        return _Gradient(bench)


class _Gradient(SGDTraining):
    def begin(self, total: Tensor) -> None:
        assert int(total.max()) <= 1, "a second step would be one from a gradient"
        super().begin(total)

    def _step(self) -> None:
        task = self._task(self.bench.predict(self.pixels))
        gradients = torch.autograd.grad(task.sum(), self.trained)
        with torch.no_grad():
            for value, gradient in zip(self.trained, gradients, strict=True):
                value.copy_(gradient)
        self.loss += task.detach()
