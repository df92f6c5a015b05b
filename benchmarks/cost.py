"""What the device does, measured, for the floors of `hilora.kernels.cost`."""

from __future__ import annotations

import torch

from benchmarks.timing import DEVICE, SECONDS, Step, ready, take_turns
from hilora.kernels.cost import Cost as Cost
from hilora.kernels.cost import Rates as Rates


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
