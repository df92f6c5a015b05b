"""AdapterBank: the adapters of all projections of one shape, seen as one tensor per tier and factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.factors import Held, joined, sharded_as, slot_count, squeezed
from hilora.adapters.shared import Composition
from hilora.adapters.table import AdapterTable
from hilora.adapters.torch_internals import reshape_parameter
from hilora.errors import InvalidValueError

if TYPE_CHECKING:
    from hilora.adapters.layers import TieredLoRALinear


class AdapterBank:
    """Adapters of P projections `in → out`, S of them (slots) in each tier.

    The parameters belong to the layers; a bank is how they are seen together: a tier is one batch of matrices, so that
    a penalty, an aggregation and a file see two tensors a tier, however many layers the model has. Each parameter has
    memory of its own: tools drop, when they write files, what seems to be one tensor under several names.

    Attributes:
        layers: the layers of a model, in its order, that share the adapters' shape.
        names: paths of the P projections.
        in_features: of each projection.
        out_features: of the widest projection of a layer; narrower ones leave the last rows of their B unused.
    """

    def __init__(self, layers: Sequence[TieredLoRALinear], names: Sequence[str]) -> None:
        self.layers, self.names, self.shared = tuple(layers), tuple(names), layers[0].shared
        self.in_features, self.out_features = layers[0].in_features, max(width for _, width in layers[0].columns)
        self._counts = [len(layer.columns) for layer in layers]

    @property
    def config(self) -> HiLoRAConfig:
        return self.shared.config

    @property
    def tiers(self) -> tuple[str, ...]:
        return self.config.tiers

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def slots(self) -> dict[str, Tensor | None]:
        """Tier → int32 `[G]`, which adapter each of G equal groups of rows uses, -1 for none; or None."""
        return self.shared.slots

    @property
    def ranks(self) -> dict[str, Tensor | None]:
        """Tier → int32 `[S]`, the ranks of adapters that do not have all of the tier's; or None."""
        return self.shared.ranks

    @property
    def composition(self) -> Composition | None:
        """What weighs the tiers' outputs against each other; see `Shared`."""
        return self.shared.composition

    @composition.setter
    def composition(self, composition: Composition | None) -> None:
        self._number()
        self.shared.composition = composition

    def A(self, tier: str) -> Tensor:
        """A of the tier, `[P, S, r, in]`: a copy, with a history; what is held, if something is."""
        held = self.shared.held.get(tier)
        return held.A if held is not None else self._joined("lora_A", tier)

    def B(self, tier: str) -> Tensor:
        """B of the tier, `[P, S, out, r]`, likewise."""
        held = self.shared.held.get(tier)
        return held.B if held is not None else self._joined("lora_B", tier)

    def scaled_B(self, tier: str) -> Tensor:
        """`B` with the scales of what is held in it, likewise."""
        held = self.shared.held.get(tier)
        return self.B(tier) if held is None else held.scaled_B

    def _joined(self, factor: str, tier: str) -> Tensor:
        return joined(self._parameters(factor, tier), self._counts)

    def _parameters(self, factor: str, tier: str) -> list[nn.Parameter]:
        return [getattr(layer, factor)[tier] for layer in self.layers]

    def parameters(self, tier: str) -> list[nn.Parameter]:
        """The layers' parameters of a tier: all A, then all B."""
        return self._parameters("lora_A", tier) + self._parameters("lora_B", tier)

    def slot_count(self, tier: str) -> int:
        """S of a tier."""
        held = self.shared.held.get(tier)
        if held is not None:
            return held.A.shape[1]
        return slot_count(self.layers[0].lora_A[tier], self._counts[0])

    def rank_of(self, tier: str) -> Tensor:
        """The rank of each of the tier's adapters, int64 `[S]` on the CPU."""
        ranks = self.shared.ranks[tier]
        if ranks is None:
            return torch.full((self.slot_count(tier),), self.config.rank(tier))
        return ranks.cpu().long()

    def table(self, tier: str) -> AdapterTable:
        """The tier's adapters: `[S, P, r, in]`, `[S, P, out, r]`, views of `A` and `B` where all have all ranks; with
        the scales of what is held."""
        A, B = (factor(tier).detach().transpose(0, 1) for factor in (self.A, self.B))
        scales = self.shared.held[tier].scales if tier in self.shared.held else None
        table = AdapterTable([A], [B], self.rank_of(tier), scale=None if scales is None else scales.cpu())
        return table if self.shared.ranks[tier] is None else table.leading(table.rank)

    @property
    def active(self) -> str | None:
        """The tier in training, if one is."""
        for tier in self.tiers:
            held = self.shared.held.get(tier)
            factors = self.parameters(tier) if held is None else [held.A, held.B]
            if any(factor.requires_grad for factor in factors):
                return tier
        return None

    def activate(self, tier: str | None) -> None:
        """Let this tier's parameters require gradients, and no others."""
        for name in self.tiers:
            for parameter in self.parameters(name):
                parameter.requires_grad_(name == tier)

    def fresh(
        self, tier: str, slots: int, generator: torch.Generator | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """New adapters of a tier that change nothing yet, on the CPU: A `[P, slots, r, in]` Kaiming-uniform as in PEFT,
        B `[P, slots, out, r]` zero. Or the `rows` `[n]` of them alone, a few in no more memory than they take."""
        count, rank = len(self.names), self.config.rank(tier)
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_(a=√5)
        if rows is None or 2 * len(rows) > slots:
            A = torch.empty(count, slots, rank, self.in_features).uniform_(-bound, bound, generator=generator)
            A = A if rows is None else A[:, rows]
        else:
            A, drawn = torch.empty(count, len(rows), rank, self.in_features), torch.empty(rank, self.in_features)
            for projection in A:
                for slot in range(slots):  # all are drawn, as the stream goes from one to the next
                    projection[rows == slot] = drawn.uniform_(-bound, bound, generator=generator)
        return A, A.new_zeros(count, A.shape[1], self.out_features, rank)

    def start(self) -> None:
        """Give layers that have no parameters yet fresh ones, of which the first tier is in training: in fp32 also
        beside narrower weights, as in PEFT."""
        for tier in self.tiers:
            for factor, table in zip(("lora_A", "lora_B"), self.fresh(tier, self.config.slot_count(tier)), strict=True):
                weight = self.layers[0].frozen_weight
                dtype = torch.promote_types(weight.dtype, torch.float32)
                for layer, piece in zip(self.layers, table.split(self._counts), strict=True):
                    value = squeezed(piece).to(layer.device, dtype, copy=True)
                    getattr(layer, factor)[tier] = nn.Parameter(value)
        self.activate(self.tiers[0])

    def grow(self, tier: str, slots: int) -> None:
        """Add fresh adapters until the tier has at least `slots`; those that are there keep their values."""
        missing = slots - self.slot_count(tier)
        if missing > 0:
            A, B, rank = self.A(tier).detach(), self.scaled_B(tier).detach(), self.rank_of(tier)
            new_A, new_B = self.fresh(tier, missing)
            rank = torch.cat([rank, rank.new_full((missing,), self.config.rank(tier))])
            self.assign(tier, torch.cat([A, new_A.to(A)], 1), torch.cat([B, new_B.to(B)], 1), rank)

    @torch.inference_mode(False)
    @torch.no_grad()
    def assign(self, tier: str, A: Tensor, B: Tensor, rank: Tensor | None = None) -> None:
        """Give a tier's parameters other values: A `[P, S, r, in]`, B `[P, S, out, r]`, any S, copied. The parameters
        stay the same objects; an optimiser that holds moments of another shape must be made anew. What is held of the
        tier is released.

        Args:
            tier: which one.
            A: `[P, S, r, in]`.
            B: `[P, S, out, r]`.
            rank: integers `[S]`, how much of the tier's rank each of them has; all of it by default.

        Raises:
            InvalidValueError: if the shapes do not fit the bank.
        """
        self.check(tier, A, B)
        self.shared.release([tier])
        for factor, table in (("lora_A", A), ("lora_B", B)):
            parameters = self._parameters(factor, tier)
            start = 0
            for parameter, count in zip(parameters, self._counts, strict=True):
                value = squeezed(table[start : start + count].detach())
                if parameter.shape == value.shape:
                    parameter.copy_(sharded_as(parameter, value))
                    parameter.grad = None
                else:
                    reshape_parameter(parameter, value.to(parameter.device, parameter.dtype, copy=True).contiguous())
                start += count
        full = rank is None or bool((rank == self.config.rank(tier)).all())
        self.shared.ranks[tier] = None if full or rank is None else rank.to(parameters[0].device, torch.int32)

    def check(self, tier: str, A: Tensor, B: Tensor) -> None:
        """Raise an InvalidValueError unless A `[P, S, r, in]` and B `[P, S, out, r]` fit the tier."""
        count, rank = len(self.names), self.config.rank(tier)
        slots = A.shape[1] if A.dim() == 4 else -1
        fits = A.shape == (count, slots, rank, self.in_features) and B.shape == (count, slots, self.out_features, rank)
        if not fits:
            raise InvalidValueError(
                f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit tier {tier!r}: expected "
                f"[{count}, S, {rank}, {self.in_features}] and [{count}, S, {self.out_features}, {rank}]"
            )

    def hold(
        self,
        tier: str,
        A: Tensor,
        B: Tensor,
        slot: Tensor | None = None,
        ranks: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """Let the layers use these tables themselves in place of their parameters of a tier, until `release`.

        Args:
            tier: which one.
            A: `[P, S, r, in]`, any S; a leaf, or a tensor with a history, through which gradients go.
            B: `[P, S, out, r]`.
            slot: int32 `[G]` on the tables' device, or None.
            ranks: int32 `[S]` there, or None where all have the tier's rank.
            scales: fp32 `[S]` there, beside the tier's scale; or None.

        Raises:
            InvalidValueError: if the shapes do not fit the bank.
        """
        self.check(tier, A, B)
        if scales is not None and (scales.shape != A.shape[1:2] or scales.dtype != torch.float32):
            raise InvalidValueError(f"scales {scales.dtype} {tuple(scales.shape)}: expected fp32 [{A.shape[1]}]")
        self._number()
        self.shared.hold(tier, Held(A, B, scales), slot, ranks)

    def release(self) -> None:
        """Let the layers use their own parameters again, with the slots that they had."""
        self.shared.release()

    @property
    def held(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Tier → the A and B that are held."""
        return {tier: (held.A, held.B) for tier, held in self.shared.held.items()}

    def _number(self) -> None:
        """Tell the layers their places in this bank."""
        position = 0
        for layer, count in zip(self.layers, self._counts, strict=True):
            layer.position = position
            position += count

    def __repr__(self) -> str:
        shape = f"{len(self.names)} projections {self.in_features} → {self.out_features}"
        tiers = ", ".join(f"{tier}: r={self.config.rank(tier)} × {self.slot_count(tier)}" for tier in self.tiers)
        return f"AdapterBank({shape}; {tiers})"
