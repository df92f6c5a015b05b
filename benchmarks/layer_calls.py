"""The linear layer's passes by one of its plans, on tensors of this device, and the launches that they come down to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import DEVICE
from hilora.kernels import Tier, launch
from hilora.kernels.stacked_linear import plan

RANKS = (8, 8, 8)  # of the tiers, the last one in training
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], launch.Constants]


class Passes(NamedTuple):
    """Of a qkv with adapters on q and v."""

    forward: Callable[[], list[Tensor]]
    backward: Callable[[], list[Tensor]]

    def step(self) -> None:
        self.forward()
        self.backward()


def passes(rows: int, width: int, name: str, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> Passes:
    """Of one group of rows, by the plan of a name."""
    torch.manual_seed(0)
    like = {"device": device, "dtype": dtype}
    x = torch.randn(1, rows, width, **like)  # type: ignore[call-overload]
    weight = torch.randn(3 * width, width, **like) / width**0.5  # type: ignore[call-overload]
    bias = torch.randn(3 * width, **like)  # type: ignore[call-overload]
    dy = torch.randn(1, rows, 3 * width, **like)  # type: ignore[call-overload]
    factors = [(torch.randn(1, r, width) / width**0.5, torch.randn(1, width, r)) for r in RANKS]
    tiers = [
        Tier(A.to(device), B.to(device), 2.0, None, columns)
        for columns in ((0, width), (2 * width, width))
        for A, B in factors
    ]
    trained = [*[False] * (len(RANKS) - 1), True] * 2
    inner = list(plan.forward(x, weight, bias, tiers, trained, name)[1:])
    return Passes(
        lambda: list(plan.forward(x, weight, bias, tiers, trained, name)),
        lambda: plan.backward(dy, inner, x, weight, tiers, trained, name, needs_x=True),
    )


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """All launches of kernels, as they are made."""
    found: list[Launch] = []
    before = launch.launcher

    def noting(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: launch.Constants) -> None:
        found.append((kernel, grid, args, constants))
        before(kernel, grid, args, constants)

    launch.launcher = noting
    try:
        yield found
    finally:
        launch.launcher = before


def again(one: Launch) -> Callable[[], None]:
    """The same launch once more, on the same tensors."""
    kernel, grid, args, constants = one
    return lambda: launch.launcher(kernel, grid, args, constants)


def size(value: Any) -> int:
    """Bytes of a kernel's arguments."""
    if isinstance(value, tuple):
        return sum(map(size, value))
    tensor = getattr(value, "base", value)
    return tensor.numel() * tensor.itemsize if isinstance(tensor, Tensor) else 0
