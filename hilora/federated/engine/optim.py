"""AdamW for many clients at once, each with steps, clipping and a learning rate of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Slotted(NamedTuple):
    """A parameter that holds a tensor for each of G clients along the dimension `dim`.

    `part`: 1 where it is trained and 0 where it stays as it is, of a shape that broadcasts to the parameter's; None
    trains all of it.
    """

    parameter: Tensor
    dim: int
    lr: float
    part: Tensor | None = None


class SlotAdamW:
    """AdamW (Loshchilov & Hutter, 2019) on G clients' parameters: as G optimisers, since it works element by element.

    A client that sits a step out keeps its parameters, moments and step count. What a part leaves out is as if it were
    not there: it counts for no gradient norm, and does not decay. Nothing waits for the device.

    Args:
        parameters: what is trained.
        clients: G.
        weight_decay: as in `torch.optim.AdamW`.
        clip_norm: the norm that a client's gradient, over all parameters, is scaled down to; None: it is not.
        betas: as in `torch.optim.AdamW`.
        eps: as in `torch.optim.AdamW`.
    """

    def __init__(
        self,
        parameters: Sequence[Slotted],
        clients: int,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters, self.weight_decay, self.clip_norm = list(parameters), weight_decay, clip_norm
        self.betas, self.eps = betas, eps
        self.moments = [(torch.zeros_like(p.parameter), torch.zeros_like(p.parameter)) for p in parameters]
        self.steps = torch.zeros(clients, dtype=torch.float64, device=parameters[0].parameter.device)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all steps."""
        self.steps.zero_()
        for pair in self.moments:
            for moment in pair:
                moment.zero_()

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], takes_part: Tensor, rate: Tensor | None = None) -> None:
        """One step of the clients `takes_part` (bool `[G]`), with their learning rates times `rate` `[G]`."""
        self.steps += takes_part
        beta1, beta2 = self.betas
        steps = self.steps.clamp_min(1)
        gradients = [
            gradient if one.part is None else gradient * one.part
            for gradient, one in zip(gradients, self.parameters, strict=True)
        ]
        clipped = self._clip(gradients)
        for (parameter, dim, lr, part), (first, second), gradient, kept in zip(
            self.parameters, self.moments, gradients, clipped, strict=True
        ):
            shape = [-1 if axis == dim else 1 for axis in range(parameter.dim())]

            def of_client(values: Tensor, shape: list[int] = shape, like: Tensor = parameter) -> Tensor:
                return values.to(like.dtype).view(shape)

            moves = of_client(takes_part)
            if kept is not None:
                gradient = gradient * of_client(kept)
            first.lerp_(gradient, (1 - beta1) * moves)
            second.lerp_(gradient.square(), (1 - beta2) * moves)
            scale = second.sqrt().div_(of_client((1 - beta2**steps).sqrt())).add_(self.eps)
            lrs = lr * moves if rate is None else lr * moves * of_client(rate)
            parameter.mul_(1 - (lrs if part is None else lrs * part) * self.weight_decay)
            parameter.sub_((first / scale).mul_(lrs / of_client(1 - beta1**steps)))

    def _clip(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """What to multiply each gradient by, `[G]`: as `torch.nn.utils.clip_grad_norm_` does for one client."""
        if self.clip_norm is None:
            return [None] * len(gradients)
        squares = [
            gradient.double().square().transpose(0, slotted.dim).flatten(1).sum(1)
            for gradient, slotted in zip(gradients, self.parameters, strict=True)
        ]
        norm = torch.stack(squares).sum(0).sqrt()  # [G]
        return [(self.clip_norm / (norm + 1e-6)).clamp_max(1)] * len(gradients)
