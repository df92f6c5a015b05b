"""Training steps of many clients on tensors that stay in place, so that a GPU can replay them as a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hilora.federated.engine.optim import SlotAdamW, Slotted
from hilora.kernels import twice_differentiable


class Replay:
    """Calls a function that takes nothing and leaves its results in tensors of its own.

    On CUDA its third call is captured as a graph, which all later ones replay: the device then works through a step
    without waiting for Python. What the function reads must stay where it was.
    """

    WARM_UP = 2  # calls that run as they are: kernels are compiled and memory is taken there

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.device = function, device
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.device.type != "cuda":
            return self.function()
        self.calls += 1
        if self.graph is None and self.calls <= self.WARM_UP:
            return self._on_a_side_stream()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.function()
            self.graph = graph
        return self.graph.replay()

    def _on_a_side_stream(self) -> None:
        """As torch asks for before a capture."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.function()
        torch.cuda.current_stream(self.device).wait_stream(stream)


class LocalTraining:
    """Local training of G clients, batch by batch.

    Args:
        predict: logits `[G, b, classes]` of the images in `pixels`.
        penalty: what is added to the clients' losses, `[G]`.
        trained: the parameters, each with a tensor for each client.
        pixels: uint8 `[G, b, 3, h, w]`, where each batch is put.
        weight_decay: of AdamW.
        clip_norm: of each client's gradient, or None.
        schedule: of the learning rate over a client's own steps: "constant", or to zero, "linear" or "cosine".
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        penalty: Callable[[], Tensor],
        trained: Sequence[Slotted],
        pixels: Tensor,
        weight_decay: float,
        clip_norm: float | None,
        schedule: str,
    ) -> None:
        clients, batch = pixels.shape[:2]
        self.predict, self.penalty, self.trained, self.schedule = predict, penalty, trained, schedule
        self.optimiser = SlotAdamW(trained, clients, weight_decay, clip_norm)
        self.pixels = pixels
        self.target = torch.full((clients, batch), -1, device=pixels.device)  # -1 where a client has no more images
        self.loss = torch.zeros(clients, device=pixels.device)
        self.total = torch.ones(clients, dtype=torch.float64, device=pixels.device)
        self.run = Replay(self._step, pixels.device)

    def begin(self, total: Tensor) -> None:
        """Start anew; `total` `[G]` is how many steps each client will take."""
        self.optimiser.reset()
        self.loss.zero_()
        self.total.copy_(total.clamp_min(1))

    def step(self, pixels: Tensor, target: Tensor) -> None:
        """One step on images uint8 `[G, b, 3, h, w]` and their labels `[G, b]`, -1 where there is no image. Clients
        without any stay as they are; `loss` `[G]` adds up the others' mean losses."""
        self.pixels.copy_(pixels)
        self.target.copy_(target)
        self.run()

    def _step(self) -> None:
        task = self._task(self.predict(self.pixels))
        total = (task + self.penalty()).sum()
        self._update(task, torch.autograd.grad(total, [slotted.parameter for slotted in self.trained]))

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


class BilevelTraining(LocalTraining):
    """Two levels (PF2LoRA): `lower` takes a step of SGD on a client's loss, `trained` then one of AdamW on the loss
    after that step, with the exact gradient through it:

        y' = y − α ∂f(x, y)/∂y        x ← AdamW(d f(x, y'(x)) / dx)        y ← y'

    `schedule` is that of AdamW's rates alone.

    Args:
        predict_with: logits of the images in `pixels` with other tensors in the place of those of `lower`.
        lower: parameters and their α.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        predict_with: Callable[[Tensor, Sequence[Tensor]], Tensor],
        trained: Sequence[Slotted],
        lower: Sequence[Slotted],
        pixels: Tensor,
        weight_decay: float,
        clip_norm: float | None,
        schedule: str,
    ) -> None:
        super().__init__(predict, lambda: pixels.new_zeros(()), trained, pixels, weight_decay, clip_norm, schedule)
        self.predict_with, self.lower = predict_with, lower

    def _step(self) -> None:
        values = [slotted.parameter for slotted in self.lower]
        with twice_differentiable(), sdpa_kernel(SDPBackend.MATH):
            before = self._task(self.predict(self.pixels))
            slopes = torch.autograd.grad(before.sum(), values, create_graph=True)
            moved = [v - one.lr * slope for v, one, slope in zip(values, self.lower, slopes, strict=True)]
            task = self._task(self.predict_with(self.pixels, moved))
            gradients = torch.autograd.grad(task.sum(), [slotted.parameter for slotted in self.trained])
        with torch.no_grad():
            for value, new in zip(values, moved, strict=True):
                value.copy_(new)
        self._update(task, gradients)
