"""AdapterBank: the adapters of all projections of one shape, one flat tensor per tier and factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from hilora.adapters.config import HiLoRAConfig

Mixer = Callable[[int, Tensor], Mapping[str, float | Tensor]]


class AdapterBank(nn.Module):
    """Adapters of P projections `in → out`, S of them (slots) in each tier.

    A tier is one batch of matrices, so that the optimiser, the orthogonality penalty, the aggregation and a file see
    two tensors a tier, however many layers the model has.

    Attributes:
        A: tier → parameter `[P, S, r, in]`; Kaiming-uniform when fresh.
        B: tier → parameter `[P, S, out, r]`; zero when fresh.
        names: paths of the P projections.
        slots: tier → int32 `[G]`, which adapter each of G equal groups of rows uses, -1 for none; or None.
        mixer: what weighs the tiers' outputs against each other: from a projection's number and its x `[G, M, in]`,
            for tiers that it names, a number or a tensor `[G, M]`; None adds them as they are.
    """

    def __init__(self, names: Sequence[str], config: HiLoRAConfig, like: Tensor) -> None:
        """Adapters for the projections `names`, each of the shape `[out, in]` and on the device of the weight `like`,
        in fp32 also beside narrower weights, as in PEFT."""
        super().__init__()
        self.names, self.config = tuple(names), config
        self.out_features, self.in_features = like.shape
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        self.slots: dict[str, Tensor | None] = dict.fromkeys(config.tiers)
        self.mixer: Mixer | None = None
        self.composition: Mixer | None = None
        self.held: dict[str, tuple[Tensor, Tensor]] = {}
        self._parts: dict[str, _Parts] = {}
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
        trained = (tier for tier in self.tiers if self.A[tier].requires_grad or self.B[tier].requires_grad)
        return next(trained, None)

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
        """Give a tier another table: A `[P, S, r, in]`, B `[P, S, out, r]`, any S. The parameters stay the same
        objects; an optimiser that holds moments of the former shape must be made anew.

        Raises:
            ValueError: if the shapes do not fit the bank.
        """
        self.check(tier, A, B)
        for parameter, value in ((self.A[tier], A), (self.B[tier], B)):
            # By way of another dtype: nothing else resets autograd's node, which an old graph may keep alive, and
            # which would sum gradients to the old shape.
            parameter.data = parameter.new_empty(0, dtype=torch.half if parameter.dtype != torch.half else torch.float)
            parameter.data, parameter.grad = value, None

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
        """The adapters of one projection: A `[S, r, in]`, B `[S, out, r]`."""
        A, B = self.held.get(tier) or (self.A[tier], self.B[tier])
        return self._part(f"A.{tier}", A, index), self._part(f"B.{tier}", B, index)

    def hold(self, tier: str, A: Tensor, B: Tensor, slot: Tensor | None = None) -> None:
        """Let the layers use these tensors in place of the bank's own, A `[P, S, r, in]` and B `[P, S, out, r]`."""
        self.held[tier], self.slots[tier] = (A, B), slot

    def _part(self, key: str, parameter: Tensor, index: int) -> Tensor:
        """`parameter[index]`.

        In training, all projections of a forward pass are taken apart by one `unbind`: layer by layer, the backward
        pass would write a gradient of the whole bank for each of them. A part is handed out once, so that every forward
        pass has an unbind of its own.
        """
        trains = parameter.requires_grad and torch.is_grad_enabled()
        if not trains or torch.compiler.is_compiling():
            return parameter[index]
        stamp = (id(parameter), parameter._version, parameter.untyped_storage()._cdata)
        parts = self._parts.get(key)
        if parts is None or parts.stamp != stamp or parts.views[index] is None:
            parts = self._parts[key] = _Parts(stamp, list(parameter.unbind(0)))
        view, parts.views[index] = parts.views[index], None
        assert view is not None
        return view

    def select(self, tier: str, slot: int) -> tuple[Tensor, Tensor]:
        """One adapter of the tier for all projections: A `[P, r, in]`, B `[P, out, r]`.

        Raises:
            IndexError: if the tier has no such slot.
        """
        count = self.A[tier].shape[1]
        if not 0 <= slot < count:
            raise IndexError(f"tier {tier!r} has {count} slots, there is no slot {slot}")
        return self.A[tier][:, slot], self.B[tier][:, slot]

    def only_slot(self, tier: str) -> int | None:
        """The slot that goes without saying: 0 for one adapter, -1 for none, None where there are several."""
        count = self.A[tier].shape[1]
        return count - 1 if count < 2 else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}  # views with a history can be neither copied nor pickled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for tier, slot in self.slots.items():
            self.slots[tier] = None if slot is None else slot.to(self.A[tier].device)
        return self

    def extra_repr(self) -> str:
        shape = f"{len(self.names)} projections {self.in_features} → {self.out_features}"
        tiers = ", ".join(f"{tier}: r={self.config.rank(tier)} × {self.A[tier].shape[1]}" for tier in self.tiers)
        return f"{shape}; {tiers}"


class _Parts(NamedTuple):
    """A parameter taken apart."""

    stamp: tuple[int, int, int]  # which parameter, how often it was written to, where its values are
    views: list[Tensor | None]  # those that have not been handed out
