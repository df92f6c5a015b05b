"""Gradients of an operation that can themselves be differentiated, for backward passes that are asked for a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> list[Tensor | None]:
    """Gradients of `reference(*inputs)`, which is computed once more, for the inputs that require one.

    Args:
        reference: the operation in plain PyTorch.
        inputs: what it takes, as the backward pass has saved it.
        upstream: the gradient of its result.
    """
    # Views, lest one input's gradient takes the way through another one's history.
    own = [value.view_as(value) if value.requires_grad else value for value in inputs]
    wanted = [value for value in own if value.requires_grad]
    found = iter(torch.autograd.grad(reference(*own), wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if value.requires_grad else None for value in inputs]
