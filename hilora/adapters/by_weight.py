"""Adapted layers of which a model uses the weight, and never calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from hilora.adapters.layers import TieredLoRALinear
from hilora.errors import InvalidTypeError, InvalidValueError
from hilora.kernels.stacked_linear.reference import choose
from hilora.kernels.torch_internals import without_autocast

READ = "_hilora_read"  # attribute of a layer


class AdaptedWeightLinear(TieredLoRALinear):
    """A `TieredLoRALinear` whose `weight` is the adapted one, `W + Σ_tier scale · B_tier A_tier`, through which
    gradients go to the adapters. BEiT, EVA and Swin V2 of timm and torchvision's Swin use their layers so.

    All rows have the same adapters. Beside a weight of 16 bits, small adapters are rounded away, as by a merge.
    """

    def __init_subclass__(cls) -> None:
        if cls.__name__.startswith("Parametrized"):
            raise InvalidTypeError(
                "a model uses this layer by its weight, which adapters make: a parametrisation would take their place. "
                "Take the adapters out first, by hilora.unload(model)"
            )

    @property
    def frozen_weight(self) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W and adapters, `[out, in]`.

        Raises:
            ValueError: if clients use different adapters, or these depend on x.
        """
        if self._parameters.get("weight") is None:
            raise AttributeError("weight")
        if not torch.compiler.is_compiling():
            self.__dict__[READ] = True
        away = self.frozen_weight.is_meta and "_hf_hook" in self.__dict__  # accelerate reads it before it brings it
        return self.frozen_weight if self.shared.disabled or away else self._adapted()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # torch would read what is there
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def _adapted(self) -> Tensor:
        shared, weight = self.shared, self.frozen_weight
        if any(slot is not None and slot.shape[0] > 1 for slot in shared.slots.values()):
            raise InvalidValueError(
                "a model uses this layer by its weight, which rows of several clients cannot share: take one client at "
                "a time, hilora.set_slots with tensors of one slot"
            )
        if shared.composition is not None:
            raise InvalidValueError("a model uses this layer by its weight, which does not depend on x, as gates do")
        if is_fx_symbolic_tracing():
            raise InvalidValueError("torch.fx would write adapters down as they are now: hilora.merge(model) first")
        by_columns: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for tier in self.tiers(weight):
            if len(tier.A):
                A, B = choose(tier)
                by_columns.setdefault(tier.columns or (0, len(weight)), []).append((A[0], tier.scale * B[0]))
        rows, end = [], 0
        with without_autocast(weight):
            for start, width in sorted(by_columns):
                A, B = (torch.cat(each, dim) for dim, each in enumerate(zip(*by_columns[start, width], strict=True)))
                own = weight[start : start + width]
                rows += [weight[end:start], (own.to(A.dtype) + B @ A).to(own.dtype)]
                end = start + width
        return torch.cat([*rows, weight[end:]]) if rows else weight


def watch_reading(layer: TieredLoRALinear) -> None:
    """Let a layer note whether its weight is read; adapters are then in it."""
    if type(layer) is TieredLoRALinear:
        layer.__class__ = AdaptedWeightLinear


def was_read(layer: TieredLoRALinear) -> bool:
    """Whether a layer's weight was read since it was watched."""
    return READ in layer.__dict__


def end_watch(layer: TieredLoRALinear, keep: bool) -> None:
    """Let a layer be one that is called again, unless it is to be kept as it is."""
    layer.__dict__.pop(READ, None)
    kind: Any = AdaptedWeightLinear if keep else TieredLoRALinear
    if type(layer) is AdaptedWeightLinear:
        layer.__class__ = kind
