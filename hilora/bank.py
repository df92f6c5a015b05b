"""AdapterBank: the adapters of all projections of one shape, one flat tensor per tier and factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import HiLoRAConfig


class AdapterBank(nn.Module):
    """Adapters of P projections `in → out`, S of them (slots) in each tier.

    A tier is one batch of matrices, so that the optimiser, the orthogonality penalty, the aggregation and a file see
    two tensors a tier, however many layers the model has.

    Attributes:
        A: tier → parameter `[P, S, r, in]`; Kaiming-uniform when fresh.
        B: tier → parameter `[P, S, out, r]`; zero when fresh.
        names: paths of the P projections.
        slots: tier → int32 `[G]`, which adapter each of G equal groups of rows uses, -1 for none; or None.
    """

    def __init__(self, names: Sequence[str], config: HiLoRAConfig, like: Tensor) -> None:
        """Adapters for the projections `names`, each of the shape `[out, in]` and on the device of the weight `like`,
        in fp32 also beside narrower weights, as in PEFT."""
        super().__init__()
        self.names, self.config = tuple(names), config
        self.out_features, self.in_features = like.shape
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        self.slots: dict[str, Tensor | None] = dict.fromkeys(config.tiers)
        self._parts: dict[str, tuple[Any, Sequence[Tensor], Sequence[Tensor]]] = {}
        wide = torch.promote_types(like.dtype, torch.float32)
        for tier in config.tiers:
            A, B = self.fresh(tier, config.slot_count(tier))
            self.A[tier], self.B[tier] = (nn.Parameter(factor.to(like.device, wide)) for factor in (A, B))
        self.activate(config.tiers[0])

    @property
    def tiers(self) -> tuple[str, ...]:
        return self.config.tiers

    @property
    def active(self) -> str | None:
        """The tier in training, if one is."""
        return next((tier for tier in self.tiers if self.A[tier].requires_grad), None)

    def activate(self, tier: str | None) -> None:
        """Let this tier require gradients, and no other."""
        for name in self.tiers:
            self.A[name].requires_grad_(name == tier)
            self.B[name].requires_grad_(name == tier)

    def fresh(self, tier: str, slots: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """New adapters of a tier that change nothing yet, on the CPU: A `[P, slots, r, in]` Kaiming-uniform as in PEFT,
        B `[P, slots, out, r]` zero."""
        count, rank = len(self.names), self.config.rank(tier)
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_(a=√5)
        A = torch.empty(count, slots, rank, self.in_features).uniform_(-bound, bound, generator=generator)
        return A, A.new_zeros(count, slots, self.out_features, rank)

    def grow(self, tier: str, slots: int) -> None:
        """Add fresh adapters until the tier has at least `slots`; those that are there keep their values."""
        A, B = self.A[tier], self.B[tier]
        missing = slots - A.shape[1]
        if missing > 0:
            new_A, new_B = self.fresh(tier, missing)
            self.assign(tier, torch.cat([A.data, new_A.to(A)], 1), torch.cat([B.data, new_B.to(B)], 1))

    def assign(self, tier: str, A: Tensor, B: Tensor) -> None:
        """Give a tier another table: A `[P, S, r, in]`, B `[P, S, out, r]`, any S. The parameters stay the same objects.

        Raises:
            ValueError: if the shapes do not fit the bank.
        """
        self.check(tier, A, B)
        for parameter, value in ((self.A[tier], A), (self.B[tier], B)):
            parameter.data, parameter.grad = value, None
        self._parts.pop(tier, None)

    def check(self, tier: str, A: Tensor, B: Tensor) -> None:
        """Raise a ValueError unless A `[P, S, r, in]` and B `[P, S, out, r]` fit the tier."""
        count, rank = len(self.names), self.config.rank(tier)
        slots = A.shape[1] if A.dim() == 4 else -1
        fits = A.shape == (count, slots, rank, self.in_features) and B.shape == (count, slots, self.out_features, rank)
        if not fits:
            raise ValueError(
                f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit tier {tier!r}: expected "
                f"[{count}, S, {rank}, {self.in_features}] and [{count}, S, {self.out_features}, {rank}]"
            )

    def part(self, tier: str, index: int) -> tuple[Tensor, Tensor]:
        """The adapters of one projection: A `[S, r, in]`, B `[S, out, r]`.

        All projections are taken apart at once, by one `unbind` until the parameters change: layer by layer, the
        backward pass would write a gradient of the whole bank for each of them.
        """
        A, B = self.A[tier], self.B[tier]
        if torch.compiler.is_compiling():
            return A[index], B[index]
        stamp = [(p._version, p.untyped_storage()._cdata, p.requires_grad) for p in (A, B)], torch.is_grad_enabled()
        found = self._parts.get(tier)
        if found is None or found[0] != stamp:
            found = self._parts[tier] = (stamp, A.unbind(0), B.unbind(0))
        return found[1][index], found[2][index]

    def select(self, tier: str, slot: int) -> tuple[Tensor, Tensor]:
        """One adapter of the tier for all projections: A `[P, r, in]`, B `[P, out, r]`.

        Raises:
            IndexError: if the tier has no such slot.
        """
        count = self.A[tier].shape[1]
        if not 0 <= slot < count:
            raise IndexError(f"tier {tier!r} has {count} slots, there is no slot {slot}")
        return self.A[tier][:, slot], self.B[tier][:, slot]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": {}}  # views with a history can be neither copied nor pickled

    def extra_repr(self) -> str:
        shape = f"{len(self.names)} projections {self.in_features} → {self.out_features}"
        tiers = ", ".join(f"{tier}: r={self.config.rank(tier)} × {self.A[tier].shape[1]}" for tier in self.tiers)
        return f"{shape}; {tiers}"
