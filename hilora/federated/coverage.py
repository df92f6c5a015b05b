"""Means of what clients cover in part: some hold fewer ranks of an adapter, some train fewer of its projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable


def covered_mean(table: AdapterTable, weights: Tensor, before: AdapterTable) -> AdapterTable:
    """The mean of n clients' adapters, entry by entry over those that have it; where nobody has, what was before.

    Args:
        table: `[n, ...]`, with the ranks and the projections that each client has.
        weights: `[n]`, not negative.
        before: one row, with room for as many ranks.

    Returns:
        One row.
    """

    def mean(values: Tensor, covered: Tensor, old: Tensor) -> Tensor:
        of_each = weights.to(values).view(-1, *[1] * (values.dim() - 1)) * covered.to(values)
        total = of_each.sum(0)
        found = (of_each * values).sum(0) / total.where(total > 0, 1)
        return found.where(total > 0, old[0])[None]

    return _entrywise(mean, table, before)


def filled(table: AdapterTable, before: AdapterTable) -> AdapterTable:
    """The adapters of n clients, with what was before, one row, in the place of what a client does not have.

    A mean of these counts all clients in every entry, so that one that few have moves little.
    """
    return _entrywise(lambda values, covered, old: values.where(covered, old), table, before)


def _entrywise(
    change: Callable[[Tensor, Tensor, Tensor], Tensor], table: AdapterTable, before: AdapterTable
) -> AdapterTable:
    """A table from each factor, which of its entries a client has (bool, of a shape that broadcasts), and the factor
    before."""
    ranks = torch.arange(table.r) < table.rank[:, None]  # [n, r]

    def of(factor: str) -> list[Tensor]:
        found = []
        for index, (values, old) in enumerate(zip(getattr(table, factor), getattr(before, factor), strict=True)):
            covered = ranks[:, None, :, None] if factor == "A" else ranks[:, None, None, :]
            if table.has:
                covered = covered & table.has[index][..., None, None]
            found.append(change(values, covered.to(values.device), old.to(values)))
        return found

    return AdapterTable(of("A"), of("B"))
