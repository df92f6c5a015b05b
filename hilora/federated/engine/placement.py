"""Clients' adapters on their way from the tables of a strategy into the banks of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from hilora.adapters.bank import AdapterBank
from hilora.adapters.table import AdapterTable, Stack
from hilora.federated.protocol import Rows

Placed = Mapping[str, Rows[AdapterTable]]
"""For each tier of the banks, the adapters in them; their slots are those of G clients."""


def arranged(banks: Sequence[AdapterBank], tiers: Placed, own: Collection[str] = ()) -> dict[str, Rows[AdapterTable]]:
    """The adapters of G clients as the banks can hold them; a tier that is absent has none.

    Each client has a row of its own in the tiers `own`, and where a table is longer than there are clients.
    """
    found = {}
    for tier in banks[0].tiers:
        rows = tiers.get(tier)
        if rows is None:
            found[tier] = _none(banks, tier)
            continue
        slot = rows.slot
        if tier in own or len(rows.table) > len(slot):
            table = rows.table.rows(slot.clamp_min(0))
            rows = Rows(table, torch.where(slot >= 0, torch.arange(len(slot)), -1))
        found[tier] = rows
    return found


def all_share(rows: Rows[AdapterTable]) -> bool:
    """Whether all clients use the only adapter of a table."""
    return len(rows.table) == 1 and bool((rows.slot >= 0).all())


def _none(banks: Sequence[AdapterBank], tier: str) -> Rows[AdapterTable]:
    rank = banks[0].config.rank(tier)
    A = [torch.empty(0, len(bank.names), rank, bank.in_features) for bank in banks]
    B = [torch.empty(0, len(bank.names), bank.out_features, rank) for bank in banks]
    return Rows(AdapterTable(A, B), torch.empty(0, dtype=torch.long))


class Placement:
    """Adapters of G clients in the banks of a model, on its device, in memory of their own.

    Attributes:
        tiers: what is there, for each tier.
        held: the tensors that the banks hold: for each tier, A `[P, S, r, in]` and B `[P, S, out, r]` of each bank.
        ranks: for each tier, int32 `[S]` where adapters have less than the tier's rank, else None.
        scales: for each tier, fp32 `[S]` where adapters have scales of their own, else None.
        shared: the tiers of which all clients use the only adapter.
    """

    def __init__(self, banks: Sequence[AdapterBank], tiers: Placed, device: torch.device) -> None:
        def copy(tensor: Tensor) -> Tensor:  # the projections, not the clients, come first in memory
            return tensor.transpose(0, 1).to(device, copy=True, memory_format=torch.contiguous_format).transpose(0, 1)

        def copied(table: AdapterTable) -> AdapterTable:
            factors = list(map(copy, table.A)), list(map(copy, table.B))
            scale = None if table.scale is None else table.scale.clone()
            return AdapterTable(*factors, table.rank.clone(), scale=scale)

        self.banks = banks
        self.tiers = {tier: Rows(copied(rows.table), rows.slot.to(device, torch.int32)) for tier, rows in tiers.items()}
        self.ranks = {
            tier: rows.table.rank.to(device, torch.int32) if (rows.table.rank < rows.table.r).any() else None
            for tier, rows in tiers.items()
        }
        self.scales = {
            tier: None if rows.table.scale is None else rows.table.scale.to(device, copy=True)
            for tier, rows in tiers.items()
        }
        self.shared = {tier for tier, rows in tiers.items() if all_share(rows)}
        self.held = {
            tier: [(A.transpose(0, 1), B.transpose(0, 1)) for A, B in rows.table.factors]
            for tier, rows in self.tiers.items()
        }

    @torch.no_grad()
    def overwrite(self, tiers: Placed) -> None:
        """Copy the values of adapters of the same shapes, shared by all where these are, here; the tensors stay where
        they are."""
        for tier, rows in tiers.items():
            kept = self.tiers[tier]
            overwrite(kept.table, rows.table)
            kept.slot.copy_(rows.slot)
            for kept_there, given in ((self.ranks[tier], rows.table.rank), (self.scales[tier], rows.table.scale)):
                if kept_there is not None and given is not None:
                    kept_there.copy_(given)

    def hold(self) -> None:
        """Let the banks' layers use these adapters."""
        for tier, pairs in self.held.items():
            self.hold_tier(tier, pairs)

    def hold_tier(self, tier: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Let them use the adapters `[P, S, r, in]` and `[P, S, out, r]` of each bank in a tier, with its slots."""
        slot = self.tiers[tier].slot if len(self.tiers[tier].slot) else None
        for bank, (A, B) in zip(self.banks, pairs, strict=True):
            bank.hold(tier, A, B, slot, self.ranks[tier], self.scales[tier])

    def table(self, tier: str) -> AdapterTable:
        """The adapters of a tier, `[S, ...]`, as they are now."""
        rows = self.tiers[tier].table
        return rows.each(torch.Tensor.detach)


@torch.no_grad()
def overwrite(kept: Stack, values: Stack) -> None:
    """Copy values into tensors of the same shapes, which stay where they are."""
    given = values.tensors()
    for name, tensor in kept.tensors().items():
        tensor.copy_(given[name])
