"""How many ranks an adapter needs: those that hold a share of its energy, the squares of its singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.algorithms.aggregation import product_space_mean


def by_size(table: AdapterTable) -> AdapterTable:
    """The same products, with ranks in descending order of their singular values: columns of B orthonormal, A carries
    the singular values."""
    one = torch.ones(1)
    pairs = [product_space_mean(A[None], B[None], one, table.r) for A, B in table.factors]
    return AdapterTable([A for A, _ in pairs], [B for _, B in pairs])


def energy_ranks(table: AdapterTable, share: float) -> Tensor:
    """The fewest ranks that hold a share of an adapter's energy over all projections, one at least: int64 `[S]`."""
    energy = torch.zeros(len(table), table.r, dtype=torch.float64)
    for A in by_size(table).A:
        energy += A.double().square().sum((1, 3)).cpu()
    held = energy.cumsum(1)
    enough = held >= share * held[:, -1:] * (1 - 1e-9)  # rounding may leave the last rank a little short of all
    return enough.int().argmax(1) + 1


def compressed(table: AdapterTable, share: float) -> AdapterTable:
    """Of each adapter no more ranks than hold a share of its energy: the best product of so many."""
    return by_size(table).leading(torch.minimum(table.rank, energy_ranks(table, share)))
