"""A model of cost: the least arithmetic and the fewest bytes of an operation, over what a device does.

No implementation can be much faster than its floor: the longer of the time its arithmetic takes at the rate of a large
matrix product, and the time its bytes take at the bandwidth of a large copy. Inputs are read once and outputs written
once; what stays within one pass (`x Aᵀ`) moves no bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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


def layer(
    rows: int, width: int, ranks: Sequence[int], groups: int = 1, size: int = 2, out: int = 3, adapted: int = 2,
    readers: int = 1,
) -> tuple[Cost, Cost]:  # fmt: skip
    """A linear layer with adapters: a forward pass, and the backward pass of dx and the last tier's gradients.

    The base takes `2·M·w·out·w` FLOPs for y and as many for dx. One thin product with A or B of the adapted columns
    takes `2·M·r·adapted·w`. A tier needs two of them in each direction, unless all are folded into a weight of each
    group (`2·w·r·adapted·w`); the one in training needs `x Aᵀ` and `dY B` anyhow, and two more for its gradients.

    Args:
        rows: of all groups together.
        width: of x.
        ranks: of each tier; none for a frozen layer.
        groups: clients, each with adapters of its own.
        size: bytes of a number.
        out: columns of y, in widths.
        adapted: those with adapters, in widths.
        readers: layers that read x.
    """
    M, w = rows, width
    base, moved = 2 * M * w * out * w, (out + readers) * M * w * size + out * w * w * size
    thin, folding = ([2 * many * r * adapted * w for r in ranks] for many in (M, groups * w))
    factors = [groups * 2 * adapted * r * w * size for r in ranks]
    forward = base + min(2 * sum(thin), sum(folding)), moved + sum(factors)
    trained = 2 * thin[-1] if ranks else 0
    more = M * w * size + factors[-1] if ranks else 0  # x once more, and the gradients
    backward = base + trained + min(2 * sum(thin), sum(folding) + trained), moved + sum(factors) + more
    return Cost((forward,)), Cost((backward,))
