"""TieredLoRALinear: a frozen linear layer with stacked tiers of low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.parametrize import is_parametrized, transfer_parametrizations_and_params

from hilora import kernels
from hilora.adapters.bank import AdapterBank
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.factors import Factors, cut, pieces
from hilora.adapters.frozen import FrozenLinear
from hilora.adapters.offload import check_brought, device_of, own_forward, take_over_offloading
from hilora.adapters.shared import Shared
from hilora.adapters.torch_internals import in_transform, owns_weight, take_over_hooks
from hilora.errors import InvalidTypeError, InvalidValueError, SlotError
from hilora.kernels.stacked_linear.reference import choose
from hilora.models.pointwise import widths

Columns = tuple[int, int]


class TieredLoRALinear(FrozenLinear):
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
        order: where in the output the columns of `parts` really are, int64 `[out]`; None: where they say.

    Attributes:
        lora_A: tier → parameter `[r, in]`; `[S, r, in]` for S ≠ 1 adapters; with a leading dimension for the
            projections of a fused layer of which several are adapted. Kaiming-uniform when fresh.
        lora_B: tier → parameter `[out, r]`, `[S, out, r]`, …; zero when fresh.

    Raises:
        TypeError: if `base` computes anything but an `nn.Linear` does, for a config beside its fields, or for a
            `base_dtype` where `base` computes its weight.
    """

    def __init__(
        self,
        base: nn.Module,
        config: HiLoRAConfig | None = None,
        parts: Mapping[str, Columns] | None = None,
        shared: Shared | None = None,
        order: Tensor | None = None,
        **fields: Any,
    ) -> None:
        _check_base(base, self.replaces)
        if config is not None and fields:
            raise InvalidTypeError(f"give a config or its fields, not both: {', '.join(fields)}")
        config = config or HiLoRAConfig(**fields)
        in_features, out_features = widths(base) or (0, 0)
        super().__init__(in_features, out_features, bias=base.bias is not None)
        adopt(self, base)
        self.requires_grad_(False)
        self.parts = None if parts is None else tuple(parts)
        self.columns: tuple[Columns, ...] = ((0, out_features),) if parts is None else tuple(parts.values())
        self.widths = tuple(width for _, width in self.columns)
        self.order: Tensor | None
        self.register_buffer("order", None if order is None else order.to(self.frozen_weight.device), persistent=False)
        self.shared = shared or Shared(config)
        self.position = 0  # of its first projection, in the bank that holds tables or weighs tiers
        self.rows_are_the_batch: bool | None = None  # whether groups of rows can be clients; None: not known yet
        self.lora_A, self.lora_B = Factors(), Factors()
        # A module with a hook keeps nn.TransformerEncoderLayer off its fast path, which uses only the weight.
        self.lora_A.register_forward_pre_hook(_no_effect)
        if shared is None:
            AdapterBank([self], [""]).start()
            if config.base_dtype is not None:
                self.narrow()

    replaces: ClassVar[type[nn.Module]] = nn.Linear

    @property
    def config(self) -> HiLoRAConfig:
        """The adapters."""
        return self.shared.config

    def narrow(self) -> None:
        """Keep the weight in 8 bits from now on.

        Raises:
            TypeError: where it is computed, or read by the model, or not of floating-point numbers.
        """
        if type(self) is not TieredLoRALinear or not owns_weight(self):
            raise InvalidTypeError(
                "a base in 8 bits is for linear layers that are called and own their weight: this one's is computed, "
                "or read by the model, or that is not known yet. Give hilora.inject an example_input, or leave "
                "base_dtype out"
            )
        super().narrow()

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return device_of(self, self.frozen_weight if self.weight_scale is None else self.weight_scale)

    @property
    def rows(self) -> list[slice | Tensor]:
        """Where the projections are in the layer's output, and in the rows of W."""
        places = [slice(start, start + width) for start, width in self.columns]
        return [*places] if self.order is None else [self.order[place] for place in places]

    def plain(self) -> nn.Module:
        """A layer as it was before it was adapted, without values."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`. Where slots tell clients apart, the leading rows are in G equal groups.

        Raises:
            ValueError: if the rows are not G equal groups, or it was never said which of several adapters to use.
        """
        if isinstance(x, Proxy):
            return self.as_node(x)
        if self.shared.disabled:
            return self.product(x, []) if self.weight_scale is not None else super().forward(x)
        grouped = self.grouped(x)
        y = self.product(grouped, self.tiers(grouped), self.dropout)
        return y if grouped is x else y.reshape(*x.shape[:-1], self.out_features)

    def as_node(self, x: Proxy) -> Tensor:
        """What the layer gives where torch.fx writes a graph down: it is one node of that."""
        tracer: Any = x.tracer
        node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        return node

    def grouped(self, x: Tensor) -> Tensor:
        """x as `[G, M, in]`, where slots tell clients apart."""
        for slot in self.shared.slots.values():
            if slot is not None:
                break
        else:
            return x
        groups = slot.shape[0]
        if x.dim() == 3 and x.shape[0] == groups:
            return x
        if x.dim() < 2 or x.shape[0] % groups:
            raise InvalidValueError(f"the rows of x {tuple(x.shape)} are not {groups} equal groups, as the slots say")
        grouped: Tensor = x.unflatten(0, (groups, x.shape[0] // groups)).flatten(1, -2)
        return grouped

    @property
    def dropout(self) -> float:
        """Of what the adapters see, now."""
        return self.config.lora_dropout if self.training else 0.0

    def tiers(self, x: Tensor) -> Sequence[kernels.Tier]:
        """What is added to `x Wᵀ`, x `[..., in]`: for each projection, its tiers."""
        shared = self.shared
        all_held = len(shared.held) == len(shared.slots)
        A_of, B_of = ({}, {}) if all_held else (self.lora_A(), self.lora_B())
        tables = [self._used(name, A_of, B_of) for name in shared.slots]
        lasting = all_held and shared.composition is None and self.order is None
        if not lasting or torch.compiler.is_compiling() or in_transform():
            return self._placed(x, tables)
        return shared.lasting(self.position, tables, lambda: self._placed(x, tables))

    def _placed(self, x: Tensor, tables: list[list[tuple[Tensor, Tensor]]]) -> list[kernels.Tier]:
        """Tiers for each projection, of the A and B that each of the tiers has for it."""
        shared, order, tiers, found = self.shared, self.order, [], []
        rows = self.rows if order is not None else ()
        for (name, scale), own in zip(shared.config.scales.items(), tables, strict=True):
            slot, count = shared.slots[name], own[0][0].shape[0]
            if slot is None and count > 1:
                raise InvalidValueError(f"tier {name!r} has {count} adapters: say which to use by hilora.set_slots")
            found.append((name, own, scale, slot, shared.of_slots(name)))
        for index, columns in enumerate(self.columns):
            gains = {} if shared.composition is None else shared.composition(self.position + index, x)
            for name, own, scale, slot, of_slots in found:
                (A, B), gain = own[index], gains.get(name, 1.0)
                number, of_rows = (1.0, gain) if isinstance(gain, Tensor) else (gain, None)
                place, B = (columns, B) if order is None else (None, self._spread(B, rows[index]))
                tiers.append(kernels.Tier(A, B, scale * number, slot, place, of_rows, **of_slots))
        return tiers

    def _spread(self, B: Tensor, rows: Any) -> Tensor:
        """B of a projection `[S, width, r]` as one of the whole layer, `[S, out, r]`."""
        return B.new_zeros(len(B), self.out_features, B.shape[2]).index_copy(1, rows, B)

    def factors(self, tier: str, slot: int) -> list[tuple[Tensor, Tensor]]:
        """An adapter as a forward pass takes it: A `[r, in]` and B `[width, r]` for each of the layer's projections,
        zero beyond its rank; B with the scale that it is held with."""
        one = slice(slot, slot + 1)
        own = {name: None if each is None else each[one] for name, each in self.shared.of_slots(tier).items()}
        tables = self._used(tier, dict(self.lora_A), dict(self.lora_B))
        found = [choose(kernels.Tier(A[one], B[one], 1.0, **own)) for A, B in tables]
        return [(A[0], B[0]) for A, B in found]

    def _used(self, tier: str, A_of: Mapping[str, Any], B_of: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        held, widths = self.shared.held.get(tier), self.widths
        if held is not None:
            return held.parts(self.position, widths)
        found = zip(pieces(A_of[tier], len(widths)), pieces(B_of[tier], len(widths)), widths, strict=True)
        return [(A, cut(B, width)) for A, B, width in found]

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
            for rows, (A, B) in zip(self.rows, self.factors(tier, slot), strict=True):
                delta[rows] += self.config.scale(tier) * B.to(wide) @ A.to(wide)
        return delta

    def slot(self, tier: str, given: int | None) -> int:
        """The adapter of a tier that is meant: the given one, or the only one; -1 for none.

        Raises:
            ValueError: if there are several, and none is given.
            IndexError: for a slot that the tier does not have.
        """
        count = len(self._used(tier, dict(self.lora_A), dict(self.lora_B))[0][0])
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


def adopt(layer: nn.Module, base: nn.Module, computed: bool = True) -> None:
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
    take_over_offloading(layer, base)
    layer.training = base.training


def _check_base(base: nn.Module, kind: type[nn.Module]) -> None:
    if not isinstance(base, kind) or isinstance(base, TieredLoRALinear):
        raise InvalidTypeError(f"expected a plain nn.{kind.__name__} to adapt, got {type(base).__name__}")
    in_its_own_way = getattr(own_forward(base), "__func__", None) is not kind.forward
    if in_its_own_way or not (owns_weight(base) or is_parametrized(base, "weight")):
        raise InvalidTypeError(
            f"{type(base).__name__} computes its output or its weight in its own way, which adapters would bypass: "
            f"expected a plain nn.{kind.__name__}"
        )


def _no_effect(*args: object) -> None:
    """A hook that does nothing."""
