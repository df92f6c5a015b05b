"""TieredLoRALinear: a frozen linear layer with stacked tiers of low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.parametrize import is_parametrized, transfer_parametrizations_and_params

from hilora import kernels
from hilora.adapters.bank import AdapterBank, Shared
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.factors import Factors, pieces
from hilora.adapters.offload import check_brought, device_of, own_forward, take_over_offloading
from hilora.adapters.torch_internals import owns_weight, take_over_hooks
from hilora.errors import InvalidTypeError, InvalidValueError, SlotError

Columns = tuple[int, int]


class TieredLoRALinear(nn.Linear):
    """`y = x Wᵀ + b + Σ_tier scale · B_tier A_tier x`, with W and b frozen.

    By itself it wraps a linear layer:

        layer = hilora.TieredLoRALinear(nn.Linear(768, 768), r=8, lora_alpha=16)

    It shares the weight and bias of `base` and is an `nn.Linear` in its place, under the same keys. `hilora.inject`
    makes these layers inside of a model.

    Args:
        base: the layer to adapt; its hooks are kept.
        config: the adapters, or else the fields of `HiLoRAConfig` as keywords.
        parts: what `inject` adapts of it, in a model of which `shared` is known: for each projection the last name of
            its path, and (start, width) of the layer's output. None: one projection, all of the output.

    Attributes:
        lora_A: tier → parameter `[r, in]`; `[S, r, in]` for S ≠ 1 adapters; with a leading dimension for the
            projections of a fused layer of which several are adapted. Kaiming-uniform when fresh.
        lora_B: tier → parameter `[out, r]`, `[S, out, r]`, …; zero when fresh.

    Raises:
        TypeError: if `base` computes anything but an `nn.Linear` does, or for a config beside its fields.
    """

    def __init__(
        self,
        base: nn.Linear,
        config: HiLoRAConfig | None = None,
        parts: Mapping[str, Columns] | None = None,
        shared: Shared | None = None,
        **fields: Any,
    ) -> None:
        _check_base(base)
        if config is not None and fields:
            raise InvalidTypeError(f"give a config or its fields, not both: {', '.join(fields)}")
        config = config or HiLoRAConfig(**fields)
        super().__init__(base.in_features, base.out_features, device="meta", bias=base.bias is not None)
        adopt(self, base)
        self.requires_grad_(False)
        self.parts = None if parts is None else tuple(parts)
        self.columns: tuple[Columns, ...] = ((0, base.out_features),) if parts is None else tuple(parts.values())
        self.shared = shared or Shared(config)
        self.position = 0  # of its first projection, in the bank that holds tables or weighs tiers
        self.rows_are_the_batch: bool | None = None  # whether groups of rows can be clients; None: not known yet
        self.lora_A, self.lora_B = Factors(), Factors()
        # A module with a hook keeps nn.TransformerEncoderLayer off its fast path, which uses only the weight.
        self.lora_A.register_forward_pre_hook(_no_effect)
        if shared is None:
            AdapterBank([self], [""]).start()

    @property
    def config(self) -> HiLoRAConfig:
        """The adapters."""
        return self.shared.config

    @property
    def frozen_weight(self) -> Tensor:
        """W, `[out, in]`."""
        return self.weight

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return device_of(self, self.frozen_weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`. Where slots tell clients apart, the leading rows are in G equal groups.

        Raises:
            ValueError: if the rows are not G equal groups, or it was never said which of several adapters to use.
        """
        if isinstance(x, Proxy):  # torch.fx writes a graph down: this layer is one node of it
            call: Any = x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
            return call
        if self.shared.disabled:
            return super().forward(x)
        slots = (slot for slot in self.shared.slots.values() if slot is not None)
        groups = next((slot.shape[0] for slot in slots), None)
        shape = x.shape
        if groups is not None:
            if x.dim() < 2 or shape[0] % groups:
                raise InvalidValueError(f"the rows of x {tuple(shape)} are not {groups} equal groups, as the slots say")
            x = x.unflatten(0, (groups, shape[0] // groups)).flatten(1, -2)
        dropout = self.config.lora_dropout if self.training else 0.0
        y = kernels.stacked_lora_linear(x, self.frozen_weight, self.bias, self.tiers(x), dropout)
        return y if groups is None else y.reshape(*shape[:-1], self.out_features)

    def tiers(self, x: Tensor) -> list[kernels.Tier]:
        """What is added to `x Wᵀ`, x `[..., in]`: for each projection, its tiers."""
        shared, tiers = self.shared, []
        A_of, B_of = self.lora_A(), self.lora_B()
        found = []
        for name in self.config.tiers:
            tables, slot = self._used(name, A_of[name], B_of[name]), shared.slots[name]
            if slot is None and (count := tables[0][0].shape[0]) > 1:
                raise InvalidValueError(f"tier {name!r} has {count} adapters: say which to use by hilora.set_slots")
            found.append((name, tables, self.config.scale(name), slot, shared.ranks[name]))
        for index, columns in enumerate(self.columns):
            gains = shared.composition(self.position + index, x) if shared.composition is not None else {}
            for name, tables, scale, slot, ranks in found:
                gain = gains.get(name, 1.0)
                number, of_rows = (1.0, gain) if isinstance(gain, Tensor) else (gain, None)
                tiers.append(kernels.Tier(*tables[index], scale * number, slot, columns, of_rows, ranks))
        return tiers

    def factors(self, tier: str) -> list[tuple[Tensor, Tensor]]:
        """What is used of a tier: A `[S, r, in]` and B `[S, out, r]` for each of the layer's projections."""
        return self._used(tier, self.lora_A[tier], self.lora_B[tier])

    def _used(self, tier: str, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
        count, held = len(self.columns), self.shared.held.get(tier)
        if held is not None:
            return [held.part(self.position + index) for index in range(count)]
        return list(zip(pieces(A, count), pieces(B, count), strict=True))

    def delta_weight(self, slots: Mapping[str, int] | None = None) -> Tensor:
        """What the adapters add to the weight: `[out, in]`, in fp32 or wider.

        Args:
            slots: which adapter of a tier, -1 for none; the only one where a tier is not named.

        Raises:
            ValueError: for an unknown tier, or one of several adapters that is not named.
            IndexError: for a slot that a tier does not have.
        """
        check_brought(self, self._parameters.get("weight"), "weights")
        slots = slots or {}
        for tier in slots:
            self.config.rank(tier)
        wide = torch.promote_types(self.frozen_weight.dtype, torch.float32)
        delta = torch.zeros(self.out_features, self.in_features, dtype=wide, device=self.frozen_weight.device)
        for tier in self.config.tiers:
            slot = self.slot(tier, slots.get(tier))
            if slot == -1:
                continue
            for (start, width), (A, B) in zip(self.columns, self.factors(tier), strict=True):
                delta[start : start + width] += self.config.scale(tier) * B[slot].to(wide) @ A[slot].to(wide)
        return delta

    def slot(self, tier: str, given: int | None) -> int:
        """The adapter of a tier that is meant: the given one, or the only one; -1 for none.

        Raises:
            ValueError: if there are several, and none is given.
            IndexError: for a slot that the tier does not have.
        """
        count = len(self.factors(tier)[0][0])
        slot = (count - 1 if count < 2 else None) if given is None else given
        if slot is None:
            raise InvalidValueError(f"tier {tier!r} has {count} adapters: say which, {tier}=0")
        if not -1 <= slot < count:
            raise SlotError(f"tier {tier!r} has {count} slots, there is no slot {slot}")
        return slot

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.shared.to(self.device)
        return self

    def __prepare_scriptable__(self) -> Self:
        raise InvalidTypeError(
            "torch.jit.script cannot compile adapters: hilora.merge(model) first, or write the model down by "
            "torch.jit.trace or torch.export"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tiers={self.config.tiers}, r={self.config.r}, alpha={self.config.lora_alpha}"


def adopt(layer: nn.Linear, base: nn.Linear, computed: bool = True) -> None:
    """Let a layer take the place of another: its weight, bias, mode and hooks.

    Args:
        layer: the new one.
        base: the other one.
        computed: where parametrisations compute its weight or bias, take them over, too; else what they give now.
    """
    for name in ("weight", "bias"):
        value = base.frozen_weight if name == "weight" and isinstance(base, TieredLoRALinear) else getattr(base, name)
        if is_parametrized(base, name):
            value = nn.Parameter(value.detach(), requires_grad=False)
        setattr(layer, name, value)
    if computed:
        transfer_parametrizations_and_params(base, layer)
    take_over_hooks(layer, base)
    take_over_offloading(layer, base)
    layer.training = base.training


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, nn.Linear) or isinstance(base, TieredLoRALinear):
        raise InvalidTypeError(f"expected a plain nn.Linear to adapt, got {type(base).__name__}")
    in_its_own_way = getattr(own_forward(base), "__func__", None) is not nn.Linear.forward
    if in_its_own_way or not (owns_weight(base) or is_parametrized(base, "weight")):
        raise InvalidTypeError(
            f"{type(base).__name__} computes its output or its weight in its own way, which adapters would bypass: "
            "expected a plain nn.Linear"
        )


def _no_effect(*args: object) -> None:
    """A hook that does nothing."""
