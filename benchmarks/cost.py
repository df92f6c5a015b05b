"""A model of cost: the least arithmetic and the fewest bytes of an operation, over what the device was seen to do.

No implementation can be much faster than its floor: the longer of the time its arithmetic takes at the rate of a large
matrix product measured on the same device, and the time its bytes take at the bandwidth of a large copy. Inputs are
read once and outputs written once; what stays within one pass (`x Aᵀ`) moves no bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.shapes import Distances, Layer, Penalty, Round
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


def layer(shape: Layer, phase: str, adapted: bool) -> Cost:
    """A forward pass, or with one backward pass that needs dx and, of the adapters, the gradients of the last tier.

    The base takes `2·M·w·3w` FLOPs for y and as many for dx. One thin product with A or B of q and v takes `2·M·r·2w`.
    A tier needs two of them in each direction, unless all are folded into a weight of each group (`2·w·r·2w`); the one
    in training needs `x Aᵀ` and `dY B` anyhow, and two more for its gradients.
    """
    M, w, r, size = shape.rows, shape.width, shape.rank, shape.torch_dtype.itemsize
    tiers = shape.tiers if adapted else 0
    base, thin, folding = 2 * M * w * 3 * w, 2 * M * r * 2 * w, tiers * shape.groups * 2 * w * r * 2 * w
    readers = 1 if shape.form == "qkv" else 3  # layers that read x
    factor = shape.groups * 4 * r * w * size  # A and B of q and v for each group
    moved = (3 + readers) * M * w * size + 3 * w * w * size + tiers * factor  # y or dY, x or dx, W, A and B
    forward = base + min(tiers * 2 * thin, folding), moved
    if phase == "forward":
        return Cost((forward,))
    trained = 2 * thin if adapted else 0
    backward = base + trained + min(tiers * 2 * thin, folding + trained), moved + (M * w * size + factor) * adapted
    return Cost((forward, backward))


def penalty(shape: Penalty) -> Cost:
    """The value and the gradient of a leaf against two frozen tiers, in fp32: `2·P·w·r²` FLOPs for each of two Gram
    matrices and as many for `B_f (B_fᵀ B)`; three factors read, one gradient written."""
    P, w, r = 2 * shape.depth, shape.width, shape.rank
    return Cost(((2 * 2 * 2 * P * w * r * r, 4 * 4 * P * w * r),))


def distances(shape: Distances) -> Cost:
    """Each pair once, in fp32: `2·w·r²` FLOPs for each projection's `U_iᵀU_j`; bases read once."""
    N, P, w, r = shape.clients, shape.projections, shape.width, shape.rank
    return Cost(((N * (N - 1) / 2 * P * 2 * w * r * r, 4 * N * P * w * r + 4 * N * N),))


def local_epoch(shape: Round, tokens: int, width: int, depth: int) -> Cost:
    """Forward and backward of the frozen ViT for each image: no gradients of weights, so twice the forward pass.

    A block takes `2·T·12w²` FLOPs for its linear layers and `4·T²w` for attention. Everything else counts nothing.
    """
    forward = depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    return Cost(((2 * forward * shape.clients * shape.images, 0),))
