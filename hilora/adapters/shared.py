"""Shared: what the layers of a bank have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from hilora import kernels
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.factors import Held

Composition = Callable[[int, Tensor], Mapping[str, float | Tensor]]


class Shared:
    """What the layers of a bank have in common; each of them refers to it.

    Attributes:
        config: the adapters.
        slots: tier → int32 `[G]`, which adapter each of G equal groups of rows uses, -1 for none; or None.
        ranks: tier → int32 `[S]`, the ranks of adapters that do not have all of the tier's; or None.
        composition: what weighs the tiers' outputs against each other: from a projection's number and its x
            `[G, M, in]`, for tiers that it names, a number or a tensor `[G, M]`; None adds them as they are.
        held: tier → tables in place of the layers' parameters.
        disabled: the layers compute as if they had no adapters.
    """

    def __init__(self, config: HiLoRAConfig) -> None:
        self.config = config
        self.slots: dict[str, Tensor | None] = dict.fromkeys(config.tiers)
        self.ranks: dict[str, Tensor | None] = dict.fromkeys(config.tiers)
        self.composition: Composition | None = None
        self.held: dict[str, Held] = {}
        self.disabled = False
        self.used: dict[int, tuple[list[object], kernels.Tiers]] = {}  # by a layer's position: its tiers, made of what
        self.before: dict[str, tuple[Tensor | None, Tensor | None]] = {}  # slots and ranks, for when nothing is held

    def release(self, tiers: Iterable[str] | None = None) -> None:
        """Hold nothing more, of these tiers or of all: slots and ranks are again what they were."""
        self.used = {}
        for tier in list(self.held) if tiers is None else tiers:
            if self.held.pop(tier, None) is not None:
                self.slots[tier], self.ranks[tier] = self.before.pop(tier)

    def hold(self, tier: str, held: Held, slot: Tensor | None, ranks: Tensor | None) -> None:
        """Use these tables in place of the layers' parameters of a tier, with slots and ranks of their own."""
        self.used = {}
        self.before.setdefault(tier, (self.slots[tier], self.ranks[tier]))
        self.held[tier], self.slots[tier], self.ranks[tier] = held, slot, ranks

    def of_slots(self, tier: str) -> dict[str, Any]:
        """What each adapter of a tier has of its own, int32 and fp32 `[S]` or None, by its name in `kernels.Tier`."""
        held = self.held.get(tier)
        return {"ranks": self.ranks[tier], "slot_scales": None if held is None else held.scales}

    def lasting(
        self,
        position: int,
        tables: Sequence[Sequence[tuple[Tensor, Tensor]]],
        place: Callable[[], Sequence[kernels.Tier]],
    ) -> kernels.Tiers:
        """The tiers of a layer for as long as the same is held: made once, and then with the factors of each call.

        Args:
            position: of the layer.
            tables: A and B of each projection, for each tier.
            place: makes the tiers, projection by projection.
        """
        made_of: list[object] = [*self.held.values(), *self.slots.values(), *self.ranks.values()]
        before, kept = self.used.get(position, ((), None))
        pairs = [pair for of_projection in zip(*tables, strict=True) for pair in of_projection]
        if kept is not None and len(before) == len(made_of) and all(map(is_, before, made_of)):
            tiers = kept.with_factors(pairs)
        else:
            tiers, kept = kernels.Tiers(place()), None
        if not any(A.requires_grad or B.requires_grad for A, B in pairs):
            self.used[position] = made_of, tiers
        elif kept is None:  # without the graph of this call
            self.used[position] = made_of, tiers.with_factors((A.detach(), B.detach()) for A, B in pairs)
        return tiers

    def to(self, device: torch.device) -> None:
        """Move slots and ranks."""
        for tensors in (self.slots, self.ranks):
            for tier, tensor in tensors.items():
                tensors[tier] = None if tensor is None else tensor.to(device)

    def __getstate__(self) -> dict[str, Any]:
        """What is held stays with the original: copies have the layers' own adapters."""
        copied = type(self)(self.config)
        copied.__dict__.update(self.__dict__)
        for name in ("slots", "ranks", "held", "before"):
            copied.__dict__[name] = dict(self.__dict__[name])
        copied.release()
        return copied.__dict__
