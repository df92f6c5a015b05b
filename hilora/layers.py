"""TieredLoRALinear: a frozen linear layer with stacked tiers of low-rank adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .bank import AdapterBank
from .config import HiLoRAConfig


class Projection(NamedTuple):
    """Where the adapters of some of a layer's outputs are: the projection `index` of a bank."""

    bank: AdapterBank
    index: int
    columns: tuple[int, int]  # (start, width) in the layer's output


class TieredLoRALinear(nn.Linear):
    """`y = x Wᵀ + b + Σ_tier scale · B_tier A_tier x`, with W and b frozen.

    By itself it wraps a linear layer and owns its adapters:

        layer = hilora.TieredLoRALinear(nn.Linear(768, 768), r=8, lora_alpha=16)

    It shares the weight and bias of `base` and is an `nn.Linear` in its place, under the same keys. Inside of a model,
    `hilora.inject` makes these layers and keeps the adapters of all of them in shared banks.

    Args:
        base: the layer to adapt.
        config: the adapters, or else the fields of `HiLoRAConfig` as keywords.
        projections: which projections of shared banks adapt the layer; None: it owns a bank for all of its outputs.
    """

    def __init__(
        self,
        base: nn.Linear,
        config: HiLoRAConfig | None = None,
        projections: Sequence[Projection] | None = None,
        **fields: Any,
    ) -> None:
        if not isinstance(base, nn.Linear) or isinstance(base, TieredLoRALinear):
            raise TypeError(f"expected a plain nn.Linear to adapt, got {type(base).__name__}")
        if config is not None and fields:
            raise TypeError(f"give a config or its fields, not both: {', '.join(fields)}")
        self.config = config or HiLoRAConfig(**fields)
        super().__init__(base.in_features, base.out_features, device="meta", bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.banks = nn.ModuleList()
        if projections is None:
            self.banks.append(AdapterBank([""], self.config, like=base.weight))
            projections = [Projection(self.banks[0], 0, (0, base.out_features))]  # type: ignore[arg-type]
        # Shared banks belong to the model: a tuple keeps them from being registered once more with each layer.
        self.projections = tuple(projections)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`. Where slots tell clients apart, the leading rows are in G equal groups."""
        groups = self._groups()
        shape = x.shape
        if groups is not None:
            if shape[0] % groups:
                raise ValueError(f"{shape[0]} rows are not {groups} equal groups, as the slots say")
            x = x.reshape(groups, -1, shape[-1])
        dropout = self.config.lora_dropout if self.training else 0.0
        y = kernels.stacked_lora_linear(x, self.weight, self.bias, self._tiers(), dropout)
        return y.view(*shape[:-1], self.out_features)

    def _tiers(self) -> list[kernels.Tier]:
        return [
            kernels.Tier(*bank.part(tier, index), bank.config.scale(tier), bank.slots[tier], columns)
            for bank, index, columns in self.projections
            for tier in bank.tiers
        ]

    def _groups(self) -> int | None:
        """G, where the adapters differ between groups of rows."""
        for bank, _, _ in self.projections:
            for tier, slot in bank.slots.items():
                if slot is not None:
                    return len(slot)
                if bank.A[tier].shape[1] > 1:
                    raise ValueError(
                        f"tier {tier!r} has {bank.A[tier].shape[1]} adapters: say which to use by hilora.set_slots"
                    )
        return None

    def delta_weight(self, slots: Mapping[str, int]) -> Tensor:
        """What the adapters in these slots add to the weight: `[out, in]`, in fp32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = torch.zeros_like(self.weight, dtype=wide)
        for bank, index, (start, width) in self.projections:
            for tier in bank.tiers:
                A, B = bank.select(tier, slots.get(tier, 0))
                delta[start : start + width] += bank.config.scale(tier) * B[index].to(wide) @ A[index].to(wide)
        return delta

    @property
    def lora_A(self) -> dict[str, Tensor]:
        """Tier → `[r, in]` (`[S, r, in]` where it has several slots), stacked over the projections of a fused layer."""
        return self._factors("A")

    @property
    def lora_B(self) -> dict[str, Tensor]:
        """Tier → `[out, r]` (`[S, out, r]` where it has several slots), stacked over the projections of a fused layer."""
        return self._factors("B")

    def _factors(self, factor: str) -> dict[str, Tensor]:
        found = {}
        for tier in self.config.tiers:
            parts = [getattr(bank, factor)[tier][index] for bank, index, _ in self.projections]
            stacked = parts[0] if len(parts) == 1 else torch.stack(parts)
            found[tier] = stacked.squeeze(-3) if stacked.shape[-3] == 1 else stacked
        return found

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tiers={self.config.tiers}, r={self.config.r}, alpha={self.config.lora_alpha}"
