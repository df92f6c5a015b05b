"""What G clients need to be trained in one forward pass, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hilora import kernels
from hilora.adapters.composition import Composition
from hilora.federated.engine.bench import LocalAlgorithm, Training
from hilora.federated.engine.blocks import Parts, PlacedParts
from hilora.federated.engine.optim import Slotted
from hilora.federated.engine.placement import Placed, Placement, overwrite
from hilora.federated.engine.predictor import Predictor
from hilora.federated.protocol import Head


class Task(NamedTuple):
    """What clients train: a tier and the head.

    Attributes:
        tier: which one.
        algorithm: how.
        epochs: passes over a client's images.
        rates: the tier whose learning rates to use.
        factors: which of the adapters' factors are trained: "AB", one of them, or "" for the head alone.
        head: whether the head is trained.
        penalty: the weights of the tier's overlap with earlier tiers, in their order.
    """

    tier: str
    algorithm: LocalAlgorithm
    epochs: int
    rates: str
    factors: str = "AB"
    head: bool = True
    penalty: tuple[tuple[str, float], ...] = ()

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers in training."""
        return (self.tier, *self.algorithm.more_tiers)


class SharedPass:
    """G clients in one forward pass (`bench.Bench`): a training that is set up serves again for clients whose tensors
    have the same shapes."""

    def __init__(
        self,
        engine: Predictor,
        tiers: Placed,
        head: Head,
        composition: Composition | None,
        task: Task,
        pixels: Tensor,
        parts: Parts | None,
    ) -> None:
        self.engine, self.task, self.pixels, self.settings = engine, task, pixels, engine.settings
        self.parts = None if parts is None else PlacedParts(engine.blocks, parts, engine.device)
        self.placement = Placement(engine.banks, tiers, engine.device)
        self.head = head.each(lambda value: value.to(engine.device, copy=True).requires_grad_(task.head))
        self.composition = None if composition is None else composition.each(self._own)
        rate, head_rate = self.settings.lr[task.rates], self.settings.head_lr[task.rates]
        self.trained: Sequence[Slotted] = self._all_trained(rate, head_rate)
        self.training: Training = task.algorithm.training(self)

    def _all_trained(self, rate: float, head_rate: float) -> list[Slotted]:
        trained = self.factors(self.task.tier, self.task.factors, rate)
        if self.composition is not None and self.composition.trained:
            trained += [Slotted(value.requires_grad_(), 0, rate) for value in self.composition.tensors().values()]
        if self.task.head:
            trained += [Slotted(value, 0, head_rate) for value in self.head.tensors().values()]
        return trained

    def _own(self, value: Tensor) -> Tensor:
        return value.to(self.engine.device, copy=True)

    def put(self, tiers: Placed, head: Head, composition: Composition | None, parts: Parts | None) -> None:
        """Start from other values."""
        if self.parts is not None and parts is not None:
            self.parts.overwrite(parts)
        self.engine.blocks.gate = None if self.parts is None else self.parts.present
        self.placement.overwrite(tiers)
        overwrite(self.head, head)
        if self.composition is not None and composition is not None:
            overwrite(self.composition, composition)
        self.placement.hold()
        self.engine._compose(self.composition)

    def predict(self, pixels: Tensor) -> Tensor:
        return self.engine._logits(pixels, self.head)

    def factors(self, tier: str, factors: str, lr: float) -> list[Slotted]:
        held = self.placement.held[tier]
        parts = [None] * len(held) if self.parts is None else self.parts.trained
        return [
            Slotted(pair["AB".index(factor)].requires_grad_(), 1, lr, part)
            for pair, part in zip(held, parts, strict=True)
            for factor in factors
        ]

    def ranks(self, tier: str) -> Tensor:
        given, table = self.placement.ranks[tier], self.placement.tiers[tier].table
        return torch.full((len(table),), table.r, device=self.engine.device) if given is None else given

    @contextmanager
    def holding(self, values: Mapping[int, Tensor]) -> Iterator[None]:
        for tier, pairs in self.placement.held.items():
            self.placement.hold_tier(tier, [(values.get(id(A), A), values.get(id(B), B)) for A, B in pairs])
        yield
        self.placement.hold()

    def penalty(self) -> Tensor:
        """`Σ_P Σ_tier γ ‖B_tierᵀ B‖²_F` of each client's adapters, `[G]`, or 0 for all where nothing weighs it."""
        gammas = dict(self.task.penalty)
        before = [tier for tier in self.engine.config.tiers if tier in gammas and tier in self._earlier()]
        total = torch.zeros((), device=self.engine.device)
        for bank, (_, active) in enumerate(self.placement.held[self.task.tier] if gammas else ()):
            frozen = [self._chosen(tier, bank) for tier in before]
            weights = [gammas[tier] for tier in before]
            total = total + kernels.gram_penalty(self._present(active, self.task.tier), frozen, weights, per_slot=True)
        return total

    def _earlier(self) -> tuple[str, ...]:
        """The tiers before the one in training, of which there are adapters."""
        tiers = self.engine.config.tiers
        return tuple(tier for tier in tiers[: tiers.index(self.task.tier)] if len(self.placement.tiers[tier].table))

    def _chosen(self, tier: str, bank: int) -> Tensor:
        """B of the adapters that the clients use, `[P, G or 1, out, r]`."""
        slot, (_, B) = self.placement.tiers[tier].slot, self.placement.held[tier][bank]
        return B if tier in self.placement.shared else self._present(B[:, slot.clamp_min(0)], tier)

    def _present(self, B: Tensor, tier: str) -> Tensor:
        """`[P, G, out, r]`, zero for clients that use none."""
        return torch.where((self.placement.tiers[tier].slot >= 0)[:, None, None], B, 0)
