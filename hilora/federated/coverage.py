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
    """The adapters of n clients, with what was before, one row or n, in the place of what a client does not have.

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


def picked(table: AdapterTable, places: Tensor, ranks: Tensor) -> AdapterTable:
    """Some ranks of one adapter for each of n clients, packed to the front.

    Args:
        table: one row.
        places: int64 `[n, r]`, the ranks in each client's order.
        ranks: int64 `[n]`, how many of them, from the first, it has.
    """
    A = [factor[0][:, places.to(factor.device)].transpose(0, 1).contiguous() for factor in table.A]
    B = [factor[0][..., places.to(factor.device)].movedim(-2, 0).contiguous() for factor in table.B]
    return AdapterTable(A, B).leading(ranks)


def scattered(table: AdapterTable, places: Tensor, before: AdapterTable) -> AdapterTable:
    """What `picked` gave, `[n, ...]`, back in its places, with what was before, one row, in all others."""
    back = places.argsort(1)  # where each rank was packed to
    there = back < table.rank[:, None]

    def of(factors: tuple[Tensor, ...], old: tuple[Tensor, ...], dim: int) -> list[Tensor]:
        shape = (len(back), 1, -1, 1) if dim == 2 else (len(back), 1, 1, -1)
        found = []
        for values, start in zip(factors, old, strict=True):
            index = back.view(shape).expand_as(values).to(values.device)
            found.append(values.gather(dim, index).where(there.view(shape).to(values.device), start.to(values)))
        return found

    return AdapterTable(of(table.A, before.A, 2), of(table.B, before.B, 3))
