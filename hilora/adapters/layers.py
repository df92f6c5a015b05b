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
from hilora.adapters.torch_internals import owns_weight, take_over_hooks
from hilora.errors import InvalidTypeError, InvalidValueError, SlotError

Columns = tuple[int, int]
_WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # dtypes that 8 bits can stand for


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
        weight: W, `[out, in]`; with `base_dtype` its 8 bits.
        weight_scale: fp32 `[out]`, what those of each row are multiplied by; else None.
        lora_A: tier → parameter `[r, in]`; `[S, r, in]` for S ≠ 1 adapters; with a leading dimension for the
            projections of a fused layer of which several are adapted. Kaiming-uniform when fresh.
        lora_B: tier → parameter `[out, r]`, `[S, out, r]`, …; zero when fresh.

    Raises:
        TypeError: if `base` computes anything but an `nn.Linear` does, for a config beside its fields, or for a
            `base_dtype` where `base` computes its weight.
    """

    weight_scale: Tensor | None
    base_dtype: torch.dtype  # of W, where it is kept in 8 bits

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
        self.register_buffer("weight_scale", None)
        self.lora_A, self.lora_B = Factors(), Factors()
        # A module with a hook keeps nn.TransformerEncoderLayer off its fast path, which uses only the weight.
        self.lora_A.register_forward_pre_hook(_no_effect)
        if shared is None:
            AdapterBank([self], [""]).start()
            if config.base_dtype is not None:
                self.narrow()

    @property
    def config(self) -> HiLoRAConfig:
        """The adapters."""
        return self.shared.config

    @property
    def frozen_weight(self) -> Tensor:
        """W, `[out, in]`, in the dtype in which the layer computes."""
        scale = self.weight_scale
        return self.weight if scale is None else kernels.dequantized(self.weight, scale, self.base_dtype)

    def narrow(self) -> None:
        """Keep W in 8 bits from now on. W counts to the precision of bfloat16, so that a model that was cast has the
        same 8 bits.

        Raises:
            TypeError: where W itself is computed, or read, or not of floating-point numbers.
        """
        if self.weight_scale is not None:
            return
        if type(self) is not TieredLoRALinear or not owns_weight(self):
            raise InvalidTypeError(
                "a base in 8 bits is for layers that are called and own their weight: this one's is computed, or read "
                "by the model, or that is not known yet. Give hilora.inject an example_input, or leave base_dtype out"
            )
        if self.weight.dtype not in _WIDE:
            raise InvalidTypeError(f"a base in 8 bits is made of floating-point numbers, got {self.weight.dtype}")
        self.base_dtype = self.weight.dtype
        values, self.weight_scale = _quantized(self.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`. Where slots tell clients apart, the leading rows are in G equal groups.

        Raises:
            ValueError: if the rows are not G equal groups, or it was never said which of several adapters to use.
        """
        if isinstance(x, Proxy):  # torch.fx writes a graph down: this layer is one node of it
            call: Any = x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
            return call
        if self.shared.disabled:
            return super().forward(x) if self.weight_scale is None else self._product(x, [])
        slots = (slot for slot in self.shared.slots.values() if slot is not None)
        groups = next((slot.shape[0] for slot in slots), None)
        shape = x.shape
        if groups is not None:
            if x.dim() < 2 or shape[0] % groups:
                raise InvalidValueError(f"the rows of x {tuple(shape)} are not {groups} equal groups, as the slots say")
            x = x.unflatten(0, (groups, shape[0] // groups)).flatten(1, -2)
        dropout = self.config.lora_dropout if self.training else 0.0
        return self._product(x, self.tiers(x), dropout).reshape(*shape[:-1], self.out_features)

    def _product(self, x: Tensor, tiers: list[kernels.Tier], dropout: float = 0.0) -> Tensor:
        scale = self.weight_scale
        if scale is None:
            return kernels.stacked_lora_linear(x, self.frozen_weight, self.bias, tiers, dropout)
        return kernels.float8_lora_linear(x, self.weight, scale, self.bias, tiers, dropout)

    def tiers(self, x: Tensor) -> list[kernels.Tier]:
        """What is added to `x Wᵀ`, x `[..., in]`: for each projection, its tiers."""
        shared, tiers = self.shared, []
        A_of, B_of = self.lora_A(), self.lora_B()
        factors = {name: self._used(name, A_of[name], B_of[name]) for name in self.config.tiers}
        for index, columns in enumerate(self.columns):
            gains = shared.composition(self.position + index, x) if shared.composition is not None else {}
            for name, tables in factors.items():
                A, B = tables[index]
                slot = shared.slots[name]
                if slot is None and A.shape[0] > 1:
                    raise InvalidValueError(
                        f"tier {name!r} has {A.shape[0]} adapters: say which to use by hilora.set_slots"
                    )
                scale, gain = self.config.scale(name), gains.get(name, 1.0)
                number, of_rows = (1.0, gain) if isinstance(gain, Tensor) else (gain, None)
                tiers.append(kernels.Tier(A, B, scale * number, slot, columns, of_rows, shared.ranks[name]))
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
        slots = slots or {}
        for tier in slots:
            self.config.rank(tier)
        wide = torch.promote_types(self.frozen_weight.dtype, torch.float32)
        delta = torch.zeros_like(self.frozen_weight, dtype=wide)
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
        """To another device or dtype; the base's 8 bits and their scales keep theirs."""

        def apply(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float8_e4m3fn:
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)
            if tensor is self.weight_scale:
                return fn(tensor.view(torch.int32)).view(tensor.dtype)
            return fn(tensor)

        if self.weight_scale is not None:
            self.base_dtype = fn(torch.empty(0, dtype=self.base_dtype)).dtype
        super()._apply(apply, recurse)
        self.shared.to(self.lora_A[self.config.tiers[0]].device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A weight of more bits, as of a plain model, is rounded to 8."""
        weight = state_dict.get(f"{prefix}weight")
        if self.weight_scale is not None and weight is not None and weight.dtype in _WIDE:
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}weight_scale"] = _quantized(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        if is_parametrized(base, name) or (value is not None and not isinstance(value, nn.Parameter)):
            value = nn.Parameter(value.detach(), requires_grad=False)
        setattr(layer, name, value)
    if computed:
        transfer_parametrizations_and_params(base, layer)
    take_over_hooks(layer, base)
    layer.training = base.training


def _check_base(base: nn.Module) -> None:
    if not isinstance(base, nn.Linear) or isinstance(base, TieredLoRALinear):
        raise InvalidTypeError(f"expected a plain nn.Linear to adapt, got {type(base).__name__}")
    if hasattr(base, "_hf_hook"):
        raise InvalidTypeError(
            f"{type(base).__name__} has a hook of accelerate, as device_map leaves it: inject the adapters first, or "
            "take it off by accelerate.hooks.remove_hook_from_module(model, recurse=True), inject, and dispatch again"
        )
    in_its_own_way = getattr(base.forward, "__func__", None) is not nn.Linear.forward
    if in_its_own_way or not (owns_weight(base) or is_parametrized(base, "weight")):
        raise InvalidTypeError(
            f"{type(base).__name__} computes its output or its weight in its own way, which adapters would bypass: "
            "expected a plain nn.Linear"
        )


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[out, in]` in 8 bits, and scales `[out]`."""
    return kernels.quantized(weight if weight.dtype == torch.float16 else weight.bfloat16())


def _no_effect(*args: object) -> None:
    """A hook that does nothing."""
