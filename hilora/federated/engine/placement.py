"""Clients' adapters on their way from the tables that a strategy keeps into the banks of a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hilora.adapters.bank import AdapterBank
from hilora.federated.engine.state import Models


class Placed(NamedTuple):
    """A tier in a bank."""

    A: Tensor  # [P, S, r, in]
    B: Tensor  # [P, S, out, r]
    slot: Tensor | None = None  # int32 [G]
    gate: Tensor | None = None  # [P, G, 2, in]


Placement = dict[str, list[Placed]]  # for each tier, one for each bank


def placement(banks: Sequence[AdapterBank], models: Models, own: Collection[str] = ()) -> Placement:
    """The adapters of a cohort's G clients, in the order of the banks; a tier that the models lack has none.

    Each client has a row of its own in the tiers `own`, and where a table is longer than there are clients.
    """
    found: Placement = {}
    for tier in banks[0].tiers:
        table = models.tiers.get(tier)
        found[tier] = []
        for index, bank in enumerate(banks):
            if table is None:
                found[tier].append(Placed(*bank.fresh(tier, 0)))
                continue
            A, B = (table.state[f"{factor}{index}"] for factor in "AB")
            gate, slot = table.state.get(f"gate{index}"), table.slot
            if gate is not None:
                gate = gate[slot].transpose(0, 1)
            if tier in own or len(A) > len(slot):
                rows = slot.clamp_min(0)
                A, B, slot = A[rows], B[rows], torch.where(slot >= 0, torch.arange(len(slot)), -1)
            found[tier].append(Placed(A.transpose(0, 1), B.transpose(0, 1), slot.int(), gate))
    return found


def copied(values: Placement, device: torch.device) -> Placement:
    """The same on a device, in memory of its own."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True, memory_format=torch.contiguous_format)

    return {
        tier: [
            Placed(copy(A), copy(B), None if slot is None else copy(slot), None if gate is None else copy(gate))
            for A, B, slot, gate in placed
        ]
        for tier, placed in values.items()
    }


@torch.no_grad()
def overwrite(kept: Placement, values: Placement) -> None:
    """Copy the values into tensors of the same shapes, which stay where they are."""
    for tier, placed in values.items():
        for targets, sources in zip(kept[tier], placed, strict=True):
            for target, source in zip(targets, sources, strict=True):
                if target is not None and source is not None:
                    target.copy_(source)


def place(banks: Sequence[AdapterBank], values: Placement) -> None:
    """Let the banks hold these tensors themselves."""
    for tier, placed in values.items():
        for bank, (A, B, slot, _) in zip(banks, placed, strict=True):
            bank.hold(tier, A, B, slot)
