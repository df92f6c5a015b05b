"""A search without gradients, for a few numbers of each client."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_STEP = 0.3


def evolve(objective: Callable[[Tensor], Tensor], start: Tensor, evaluations: int, draws: torch.Generator) -> Tensor:
    """A (1+1) evolution strategy for n problems at once: steps widen after a success and narrow after a failure.

    Args:
        objective: of points `[n, d]`, the values `[n]` to make small.
        start: `[n, d]`.
        evaluations: how often the objective is asked.
        draws: the random stream.

    Returns:
        The best points found, `[n, d]`.
    """
    best, step = start, torch.full((len(start), 1), FIRST_STEP)
    lowest = objective(best)
    for _ in range(evaluations - 1):
        tried = best + step * torch.randn(best.shape, generator=draws)
        value = objective(tried)
        better = (value < lowest)[:, None]
        best, lowest = tried.where(better, best), torch.minimum(value, lowest)
        step = step * torch.where(better, 1.5, 0.85)
    return best
