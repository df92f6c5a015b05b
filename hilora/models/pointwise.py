"""What adapters can be put into: linear layers, and convolutions that are one at each pixel."""

from __future__ import annotations

from torch import nn


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a 1 × 1 convolution that computes a linear layer at each pixel."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "same", "valid")
        and module.groups == 1
    )


def widths(module: nn.Module | None) -> tuple[int, int] | None:
    """How many features a linear layer, or such a convolution, takes and gives; None for others."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d) and is_pointwise(module):
        return module.in_channels, module.out_channels
    return None
