"""Adapters of one tier, or one slot, out of a model and into it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hilora.adapters.bank import AdapterBank
from hilora.adapters.injection import banks
from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError, SlotError


def get_adapters(model: nn.Module, tier: str, slot: int | None = None) -> AdapterTable:
    """A copy of a tier's adapters, `[S, P, r, in]` and `[S, P, out, r]` for each shape of projection.

    Args:
        model: a model with adapters, merged or not.
        tier: which one.
        slot: only this adapter of it, as a table of one row; None: all.

    Raises:
        ValueError: if the model has no such tier.
        IndexError: if the tier has no such slot.
    """
    found = banks(model, merged=True)
    for bank in found:
        bank.config.rank(tier)
    tables = [bank.table(tier) for bank in found]
    scales = {None if t.scale is None else tuple(t.scale.tolist()) for t in tables}
    if len(scales) > 1:  # a table has one for all shapes
        tables = [t.with_scale_in_B() for t in tables]
    A, B = [t.A[0] for t in tables], [t.B[0] for t in tables]
    table = AdapterTable(A, B, tables[0].rank, scale=tables[0].scale)
    index = torch.arange(len(table)) if slot is None else torch.tensor([_checked(found[0], tier, slot)])
    return table.rows(index)


def set_adapters(model: nn.Module, tier: str, table: AdapterTable, slot: int | None = None) -> None:
    """Put adapters into a tier of a model, in place. What trains stays the same; an optimiser that was made for
    another number of adapters must be made anew.

    Args:
        model: a model with adapters.
        tier: which one.
        table: the adapters. Ranks below the tier's are filled up with zeros, and remembered. A factor that the table
            lacks stays as it is.
        slot: the table's only row takes the place of this adapter; None: the table takes the place of all.

    Raises:
        ValueError: if the table does not fit the model or is not finite, or the model's slots use an adapter that it
            lacks. The model is then as it was.
        IndexError: if the tier has no such slot.
    """
    found = banks(model)
    for bank in found:
        bank.config.rank(tier)
    if slot is not None and len(table) != 1:
        raise InvalidValueError(f"slot {slot} takes a table of one adapter, got {len(table)}: see AdapterTable.rows")
    index = None if slot is None else _checked(found[0], tier, slot)
    if not bool(table.finite().all()):
        raise InvalidValueError("the adapters are not finite: the model stays as it is")
    for factor in (table.A, table.B):
        if factor and len(factor) != len(found):
            raise InvalidValueError(f"the table is of {len(factor)} shapes of projections, the model has {len(found)}")
    changes = [_change(bank, tier, table, number, index) for number, bank in enumerate(found)]
    for bank, (A, B, rank) in zip(found, changes, strict=True):
        bank.assign(tier, A, B, rank)


def _change(
    bank: AdapterBank, tier: str, table: AdapterTable, number: int, slot: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A bank's tables with others' adapters in them: A `[P, S, r, in]`, B `[P, S, out, r]`, ranks `[S]`."""
    widest, own = bank.config.rank(tier), bank.table(tier).with_scale_in_B()
    if len(table) and int(table.rank.max()) > widest:
        raise InvalidValueError(
            f"adapters of rank {int(table.rank.max())} do not fit tier {tier!r}, whose rank is {widest}: inject with a "
            "larger r, or cut them down"
        )
    table = table.resized(widest).with_scale_in_B()

    def taken(old: Tensor, factor: tuple[Tensor, ...]) -> Tensor:
        if not factor:
            return old
        new = factor[number].to(old)
        return new if slot is None else torch.cat([old[:slot], new, old[slot + 1 :]])

    fits = [
        not new or new[number].shape[1:] == old.shape[1:] for new, old in ((table.A, own.A[0]), (table.B, own.B[0]))
    ]
    if not all(fits):
        given = [tuple(factor[number].shape[1:]) for factor in (table.A, table.B) if factor]
        wanted = [tuple(own.A[0].shape[1:]), tuple(own.B[0].shape[1:])]
        raise InvalidValueError(f"adapters {given} do not fit tier {tier!r}: expected A and B {wanted}")
    A, B = taken(own.A[0], table.A), taken(own.B[0], table.B)
    if len(A) != len(B):
        raise InvalidValueError(f"the table has {len(table)} adapters without their A or B, tier {tier!r} {len(own)}")
    used = bank.slots[tier]
    if used is not None and int(used.max()) >= len(A):
        raise InvalidValueError(
            f"the model's slots use adapter {int(used.max())} of tier {tier!r}, the table has {len(A)}: choose others "
            "by hilora.set_slots"
        )
    rank = table.rank if slot is None else torch.cat([own.rank[:slot], table.rank, own.rank[slot + 1 :]])
    return A.transpose(0, 1), B.transpose(0, 1), rank


def _checked(bank: AdapterBank, tier: str, slot: int) -> int:
    count = bank.slot_count(tier)
    if not 0 <= slot < count:
        raise SlotError(
            f"tier {tier!r} has {count} slots, there is no slot {slot}: hilora.set_slots adds those it is given"
        )
    return slot
