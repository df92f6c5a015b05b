"""TieredLoRALinear: a frozen linear layer with stacked tiers of low-rank adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hilora import kernels
from hilora.adapters.bank import AdapterBank
from hilora.adapters.config import HiLoRAConfig


class Projection(NamedTuple):
    """Where the adapters of some of a layer's outputs are: which projection of a bank."""

    bank: AdapterBank
    position: int
    columns: tuple[int, int]  # (start, width) in the layer's output


class TieredLoRALinear(nn.Linear):
    """`y = x Wᵀ + b + Σ_tier scale · B_tier A_tier x`, with W and b frozen.

    By itself it wraps a linear layer and owns its adapters:

        layer = hilora.TieredLoRALinear(nn.Linear(768, 768), r=8, lora_alpha=16)

    It shares the weight and bias of `base` and is an `nn.Linear` in its place, under the same keys. Inside of a model,
    `hilora.inject` makes these layers and keeps the adapters of all of them in shared banks.

    Args:
        base: the layer to adapt; its hooks are kept.
        config: the adapters, or else the fields of `HiLoRAConfig` as keywords.
        projections: which projections of shared banks adapt the layer; None: it owns a bank for all of its outputs.

    Raises:
        TypeError: if `base` computes anything but an `nn.Linear` does, or for a config beside its fields.
    """

    def __init__(
        self,
        base: nn.Linear,
        config: HiLoRAConfig | None = None,
        projections: Sequence[Projection] | None = None,
        **fields: Any,
    ) -> None:
        _check_base(base)
        if config is not None and fields:
            raise TypeError(f"give a config or its fields, not both: {', '.join(fields)}")
        self.config = config or HiLoRAConfig(**fields)
        super().__init__(base.in_features, base.out_features, device="meta", bias=base.bias is not None)
        adopt(self, base)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.banks = nn.ModuleList()
        # A module with a hook keeps nn.TransformerEncoderLayer off its fast path, which uses only the weight.
        self.banks.register_forward_pre_hook(_no_effect)
        if projections is None:
            bank = AdapterBank([""], self.config, like=base.weight)
            self.banks.append(bank)
            projections = [Projection(bank, 0, (0, base.out_features))]
        # Shared banks belong to the model: a tuple keeps them from being registered once more with each layer.
        self.projections = tuple(projections)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`. Where slots tell clients apart, the leading rows are in G equal groups.

        Raises:
            ValueError: if the rows are not G equal groups, or it was never said which of several adapters to use.
        """
        slots = (bank.slots[tier] for bank, _, _ in self.projections for tier in bank.tiers)
        groups = next((slot.shape[0] for slot in slots if slot is not None), None)
        shape = x.shape
        if groups is not None:
            if x.dim() < 2 or shape[0] % groups:
                raise ValueError(f"the rows of x {tuple(shape)} are not {groups} equal groups, as the slots say")
            x = x.unflatten(0, (groups, shape[0] // groups)).flatten(1, -2)
        dropout = self.config.lora_dropout if self.training else 0.0
        y = kernels.stacked_lora_linear(x, self.weight, self.bias, self._tiers(x), dropout)
        return y.reshape(*shape[:-1], self.out_features)

    def _tiers(self, x: Tensor) -> list[kernels.Tier]:
        tiers = []
        for bank, position, columns in self.projections:
            gains = bank.composition(position, x) if bank.composition is not None else {}
            for name in bank.tiers:
                A, B = bank.part(name, position)
                slot = bank.slots[name]
                if slot is None and A.shape[0] > 1:
                    raise ValueError(f"tier {name!r} has {A.shape[0]} adapters: say which to use by hilora.set_slots")
                scale, gain = bank.config.scale(name), gains.get(name, 1.0)
                if isinstance(gain, Tensor):
                    tiers.append(kernels.Tier(A, B, scale, slot, columns, gain))
                else:
                    tiers.append(kernels.Tier(A, B, scale * gain, slot, columns))
        return tiers

    def delta_weight(self, slots: Mapping[str, int] | None = None) -> Tensor:
        """What the adapters add to the weight: `[out, in]`, in fp32 or wider.

        Args:
            slots: which adapter of a tier, -1 for none; the only one where a tier is not named.

        Raises:
            ValueError: for an unknown tier, or one of several adapters that is not named.
            IndexError: for a slot that a tier does not have.
        """
        slots = slots or {}
        for tier in slots:
            self.config.rank(tier)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = torch.zeros_like(self.weight, dtype=wide)
        for bank, position, (start, width) in self.projections:
            for tier in bank.tiers:
                slot = slots.get(tier, bank.only_slot(tier))
                if slot is None:
                    raise ValueError(f"tier {tier!r} has {bank.A[tier].shape[1]} adapters: say which, {tier}=0")
                if slot != -1:
                    A, B = (factor[position].to(wide) for factor in bank.select(tier, slot))
                    delta[start : start + width] += bank.config.scale(tier) * B @ A
        return delta

    @property
    def lora_A(self) -> dict[str, Tensor]:
        """Tier → `[r, in]` (`[S, r, in]` for S > 1 adapters), stacked over the projections of a fused layer."""
        return self._factors("A")

    @property
    def lora_B(self) -> dict[str, Tensor]:
        """Tier → `[out, r]` (`[S, out, r]` for S > 1 adapters), stacked likewise."""
        return self._factors("B")

    def _factors(self, factor: str) -> dict[str, Tensor]:
        found = {}
        for tier in self.config.tiers:
            parts = [getattr(bank, factor)[tier][position] for bank, position, _ in self.projections]
            stacked = parts[0] if len(parts) == 1 else torch.stack(parts)
            found[tier] = stacked.squeeze(-3) if stacked.shape[-3] == 1 else stacked
        return found

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tiers={self.config.tiers}, r={self.config.r}, alpha={self.config.lora_alpha}"


def adopt(layer: nn.Linear, base: nn.Linear) -> None:
    """Let a layer take the place of another: its weight, bias, mode and hooks."""
    layer.weight, layer.bias = base.weight, base.bias
    layer.__dict__.update({name: value for name, value in base.__dict__.items() if "hook" in name})
    layer.training = base.training


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, nn.Linear) or isinstance(base, TieredLoRALinear):
        raise TypeError(f"expected a plain nn.Linear to adapt, got {type(base).__name__}")
    if getattr(base.forward, "__func__", None) is not nn.Linear.forward or "weight" not in base._parameters:
        raise TypeError(
            f"{type(base).__name__} computes its output or its weight in its own way, which adapters would bypass: "
            "expected a plain nn.Linear"
        )


def _no_effect(*args: object) -> None:
    """A hook that does nothing."""
