"""AdamW for many clients at once, each with steps of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slotted(NamedTuple):
    """A parameter that holds a tensor for each of G clients along the dimension `dim`."""

    parameter: Tensor
    dim: int
    lr: float


class SlotAdamW:
    """AdamW (Loshchilov & Hutter, 2019) on G clients' parameters: as G optimisers, since it works element by element.

    A client that sits a step out keeps its parameters, moments and step count.
    """

    def __init__(
        self,
        parameters: list[Slotted],
        clients: int,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters, self.weight_decay, self.betas, self.eps = parameters, weight_decay, betas, eps
        self.moments = [(torch.zeros_like(p.parameter), torch.zeros_like(p.parameter)) for p in parameters]
        self.steps = torch.zeros(clients, dtype=torch.float64, device=parameters[0].parameter.device)

    @torch.no_grad()
    def step(self, gradients: list[Tensor], takes_part: Tensor) -> None:
        """One step of the clients `takes_part` (bool `[G]`)."""
        self.steps += takes_part
        beta1, beta2 = self.betas
        steps = self.steps.clamp_min(1)
        for (parameter, dim, lr), (first, second), gradient in zip(
            self.parameters, self.moments, gradients, strict=True
        ):
            shape = [-1 if axis == dim else 1 for axis in range(parameter.dim())]
            moves = takes_part.to(parameter.dtype).view(shape)
            first.lerp_(gradient, (1 - beta1) * moves)
            second.lerp_(gradient.square(), (1 - beta2) * moves)
            correction1, correction2 = ((1 - beta**steps).to(parameter.dtype) for beta in self.betas)
            scale = second.sqrt().div_(correction2.sqrt().view(shape)).add_(self.eps)
            parameter.mul_(1 - lr * self.weight_decay * moves)
            parameter.sub_(first / scale * (lr / correction1).view(shape) * moves)
