"""A model of cost: the least arithmetic and the fewest bytes of an operation, over what the device was seen to do.

No implementation can be much faster than its floor: the longer of the time its arithmetic takes at the rate of a large
matrix product measured on the same device, and the time its bytes take at the bandwidth of a large copy. Inputs are
read once and outputs written once; what stays within one pass (`x Aᵀ`) moves no bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.timing import DEVICE, SECONDS, Step, ready, take_turns


class Rates(NamedTuple):
    """What the device does."""

    flops: float  # a second, in a large matrix product
    bandwidth: float  # bytes a second, read and written by a large copy


class Cost(NamedTuple):
    """The passes of an operation: FLOPs and bytes of each."""

    passes: tuple[tuple[float, float], ...]

    def floor(self, rates: Rates) -> float:
        """Seconds."""
        return sum(max(flops / rates.flops, moved / rates.bandwidth) for flops, moved in self.passes)


def measured_rates(dtype: torch.dtype, scale: str) -> Rates:
    """By a product of square matrices and a copy of memory, both far larger than the caches."""
    n = {"toy": 64, "cpu": 2048, "cuda": 8192}[scale]
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    source = torch.ones({"toy": 2**12, "cpu": 2**27, "cuda": 2**31}[scale], device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    c = torch.empty_like(a)
    steps: dict[str, Step] = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    timings = take_turns({name: ready(step, [()]) for name, step in steps.items()}, seconds=2 * SECONDS[scale])
    return Rates(2 * n**3 / timings["product"].low, 2 * source.numel() / timings["copy"].low)
