"""The stacked linear layer in Triton, differentiated: at once, or, where something looks at each call, as an operator
of torch, which torch.compile traces and dispatch modes see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import under_autocast
from ..torch_internals import autocast_dtype, observed, without_autocast
from ..twice import differentiable_gradients
from . import hopper, reference
from .layout import Layout
from .plan import backward, forward
from .rounding import dequantized
from .tier import Tier


@torch.library.custom_op("hilora::stacked_lora_linear", mutates_args=())
def stacked_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    ranks: Sequence[Tensor | None],
    slot_scales: Sequence[Tensor | None],
    scales: Sequence[float],
    starts: Sequence[int],
    trained: Sequence[bool],
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y `[G, M, out]`, and what its backward pass needs: the adapters' inner product, and the packed adapters."""
    with torch.cuda.device_of(x):
        return forward(x, weight, bias, _tiers(A, B, slots, ranks, slot_scales, scales, starts), trained, plan)


@stacked_lora_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Sequence[Tensor], B: Sequence[Tensor],
    slots: Sequence[Tensor | None], ranks: Sequence[Tensor | None], slot_scales: Sequence[Tensor | None],
    scales: Sequence[float], starts: Sequence[int], trained: Sequence[bool], plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = Layout.of(_tiers(A, B, slots, ranks, slot_scales, scales, starts), trained, weight.shape[0], x.dtype)
    groups, M, width = x.shape
    return (
        x.new_empty(groups, M, weight.shape[0]),
        x.new_empty(groups * M, layout.ranks),
        x.new_empty(groups, layout.ranks, width),
        x.new_empty(groups, layout.width, layout.R),
    )


@torch.library.custom_op("hilora::stacked_lora_linear_backward", mutates_args=())
def stacked_lora_linear_backward(
    dy: Tensor,
    S: Tensor,
    packed_A: Tensor,
    packed_B: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    ranks: Sequence[Tensor | None],
    slot_scales: Sequence[Tensor | None],
    scales: Sequence[float],
    starts: Sequence[int],
    trained: Sequence[bool],
    plan: str,
    needs_x: bool,
) -> list[Tensor]:
    """dx if it is needed, and dA, dB of each tier in training."""
    with torch.cuda.device_of(x):
        tiers = _tiers(A, B, slots, ranks, slot_scales, scales, starts)
        return backward(dy, (S, packed_A, packed_B), x, weight, tiers, trained, plan, needs_x)


@stacked_lora_linear_backward.register_fake
def _(
    dy: Tensor, S: Tensor, packed_A: Tensor, packed_B: Tensor, x: Tensor, weight: Tensor, A: Sequence[Tensor],
    B: Sequence[Tensor], slots: Sequence[Tensor | None], ranks: Sequence[Tensor | None],
    slot_scales: Sequence[Tensor | None], scales: Sequence[float], starts: Sequence[int], trained: Sequence[bool],
    plan: str, needs_x: bool,
) -> list[Tensor]:  # fmt: skip
    factors = [factor for pair, own in zip(zip(A, B, strict=True), trained, strict=True) if own for factor in pair]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in ([x] if needs_x else []) + factors]


def _tiers(
    A: Sequence[Tensor], B: Sequence[Tensor], slots: Sequence[Tensor | None], ranks: Sequence[Tensor | None],
    slot_scales: Sequence[Tensor | None], scales: Sequence[float], starts: Sequence[int],
) -> list[Tier]:  # fmt: skip
    return [
        Tier(a, b, scale, slot, (start, int(b.shape[1])), ranks=own, slot_scales=own_scales)
        for a, b, slot, own, own_scales, scale, start in zip(
            A, B, slots, ranks, slot_scales, scales, starts, strict=True
        )
    ]


def apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], plan: str, scale: Tensor | None = None
) -> Tensor:
    """As `stacked_linear.stacked_lora_linear`, for a weight and a bias that need no gradient, and at least one tier.
    Beside `scale` the weight is in e4m3, and nothing looks at operators."""
    rows = _in_groups(x, tiers)
    A, B = [tier.A for tier in tiers], [tier.B for tier in tiers]
    rest = (
        [tier.slot for tier in tiers],
        [tier.ranks for tier in tiers],
        [tier.slot_scales for tier in tiers],
        [tier.scale for tier in tiers],
        [tier.columns[0] if tier.columns else 0 for tier in tiers],
        _trained(tiers),
        plan,
    )
    if scale is None and observed(x, weight, *A, *B):
        y: Tensor = stacked_lora_linear(rows, weight, bias, A, B, *rest)[0]
    else:
        if dtype := autocast_dtype(x.device.type):
            rows, bias = rows.to(dtype), None if bias is None else bias.to(dtype)
            weight = weight.to(dtype) if scale is None else weight
        y = _AtOnce.apply(rows, weight, scale, bias, rest, *A, *B)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def in_one_kernel(x: Tensor, weight: Tensor, tiers: Sequence[Tier], dtype: torch.dtype) -> bool:
    """Whether one kernel would serve forward, if the product is taken in a dtype."""
    layout = Layout.of(tiers, _trained(tiers), weight.shape[0], dtype)
    return hopper.forward_columns(_in_groups(x, tiers), weight, layout, dtype) > 0


def _in_groups(x: Tensor, tiers: Sequence[Tier]) -> Tensor:
    """`[G, M, in]`."""
    return x if any(tier.tells_groups_apart for tier in tiers) else x.reshape(1, -1, x.shape[-1])


def _trained(tiers: Sequence[Tier]) -> list[bool]:
    return [tier.A.requires_grad or tier.B.requires_grad for tier in tiers]


class _AtOnce(torch.autograd.Function):
    """The same without torch's dispatcher, which takes longer than the launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...],
        *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        slots, ranks, slot_scales, scales, starts, trained, plan = rest
        A, B = factors[: len(slots)], factors[len(slots) :]
        with torch.cuda.device_of(x), without_autocast(x):
            tiers = _tiers(A, B, slots, ranks, slot_scales, scales, starts)
            y, *inner = forward(x, weight, bias, tiers, trained, plan, scale)
        ctx.save_for_backward(scale, *inner, x, weight, *factors, *slots, *ranks, *slot_scales)
        ctx.rest = scales, starts, trained, plan
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, *saved = ctx.saved_tensors
        if scale is not None:
            saved[4] = dequantized(saved[4], scale, saved[3].dtype)
        dx, dA, dB = _gradients(ctx, saved, dy, stacked_lora_linear_backward._init_fn)
        return dx, None, None, None, None, *dA, *dB


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, A, B, slots, ranks, slot_scales, *ctx.rest = inputs
    ctx.save_for_backward(*output[1:], x, weight, *A, *B, *slots, *ranks, *slot_scales)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    dx, dA, dB = _gradients(ctx, saved, dy, stacked_lora_linear_backward)
    count = len(dA)
    of_slots = [_nothing(saved[start : start + count]) for start in range(len(saved) - 3 * count, len(saved), count)]
    return dx, None, None, dA, dB, *of_slots, None, None, None, None


Gradients = list[Tensor | None]


def _gradients(
    ctx: Any, saved: Sequence[Tensor], dy: Tensor | None, serve: Callable[..., list[Tensor]]
) -> tuple[Tensor | None, Gradients, Gradients]:
    """dx, and dA and dB of each tier; `serve` finds them, unless they are to be differentiated in turn."""
    S, packed_A, packed_B, x, weight, *tensors = saved
    scales, starts, trained, plan = ctx.rest
    count = len(scales)
    A, B, slots, ranks, slot_scales = (tensors[start : start + count] for start in range(0, 5 * count, count))
    dA: Gradients = [None] * count
    dB: Gradients = [None] * count
    if dy is None:
        return None, dA, dB
    if torch.is_grad_enabled():

        def again(x: Tensor, *factors: Tensor) -> Tensor:
            tiers = _tiers(factors[:count], factors[count:], slots, ranks, slot_scales, scales, starts)
            return reference.stacked_lora_linear(x, weight, None, tiers)

        of_x, *of_factors = differentiable_gradients(again, (x, *A, *B), dy)
        return of_x, of_factors[:count], of_factors[count:]
    needs_x = ctx.needs_input_grad[0]
    of_slots = slots, ranks, slot_scales
    found = iter(serve(dy, S, packed_A, packed_B, x, weight, A, B, *of_slots, scales, starts, trained, plan, needs_x))
    dx = next(found) if needs_x else None
    for index in range(count):
        if trained[index]:
            dA[index], dB[index] = next(found), next(found)
    return dx, dA, dB


def _nothing(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """No gradients. A list of optional tensors counts as a list of tensors where none of them is missing."""
    return None if any(tensor is None for tensor in tensors) else [None] * len(tensors)


stacked_lora_linear.register_autograd(_backward, setup_context=_setup)


under_autocast("stacked_lora_linear", stacked_lora_linear, cast=3)
