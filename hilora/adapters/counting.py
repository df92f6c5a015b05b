"""How many of a model's parameters are trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class ParameterCount(NamedTuple):
    """Numbers of a model's parameters."""

    trainable: int
    total: int


def count_parameters(model: nn.Module, /) -> ParameterCount:
    """How many numbers a model's parameters have, and how many of those require a gradient; adapters included."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def print_trainable_parameters(model: nn.Module, /) -> None:
    """Print `count_parameters` in a line, as PEFT does."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
