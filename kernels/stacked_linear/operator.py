"""The stacked linear layer in Triton as an operator of torch: traced by torch.compile, recomputed by checkpoints,
captured in CUDA graphs, differentiated, and cast under autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import under_autocast
from ..twice import differentiable_gradients
from . import reference
from .layout import Layout
from .plan import backward, forward
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
    scales: Sequence[float],
    starts: Sequence[int],
    trained: Sequence[bool],
    plan: str,
) -> tuple[Tensor, Tensor]:
    """y `[G, M, out]`, and what its backward pass needs of the adapters' inner product."""
    with torch.cuda.device_of(x):
        return forward(x, weight, bias, _tiers(A, B, slots, ranks, scales, starts), trained, plan)


@stacked_lora_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Sequence[Tensor], B: Sequence[Tensor],
    slots: Sequence[Tensor | None], ranks: Sequence[Tensor | None], scales: Sequence[float], starts: Sequence[int],
    trained: Sequence[bool], plan: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = Layout.of(_tiers(A, B, slots, ranks, scales, starts), trained, weight.shape[0], x.dtype)
    groups, M, _ = x.shape
    return x.new_empty(groups, M, weight.shape[0]), x.new_empty(groups * M, layout.ranks)


@torch.library.custom_op("hilora::stacked_lora_linear_backward", mutates_args=())
def stacked_lora_linear_backward(
    dy: Tensor,
    S: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    ranks: Sequence[Tensor | None],
    scales: Sequence[float],
    starts: Sequence[int],
    trained: Sequence[bool],
    plan: str,
    needs_x: bool,
) -> list[Tensor]:
    """dx if it is needed, and dA, dB of each tier in training."""
    with torch.cuda.device_of(x):
        tiers = _tiers(A, B, slots, ranks, scales, starts)
        dx, factors = backward(dy, S, x, weight, tiers, trained, plan, needs_x)
    return factors if dx is None else [dx, *factors]


@stacked_lora_linear_backward.register_fake
def _(
    dy: Tensor, S: Tensor, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor],
    slots: Sequence[Tensor | None], ranks: Sequence[Tensor | None], scales: Sequence[float], starts: Sequence[int],
    trained: Sequence[bool], plan: str, needs_x: bool,
) -> list[Tensor]:  # fmt: skip
    factors = [factor for pair, own in zip(zip(A, B, strict=True), trained, strict=True) if own for factor in pair]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in ([x] if needs_x else []) + factors]


def _tiers(
    A: Sequence[Tensor], B: Sequence[Tensor], slots: Sequence[Tensor | None], ranks: Sequence[Tensor | None],
    scales: Sequence[float], starts: Sequence[int],
) -> list[Tier]:  # fmt: skip
    return [
        Tier(a, b, scale, slot, (start, int(b.shape[1])), ranks=own)
        for a, b, slot, own, scale, start in zip(A, B, slots, ranks, scales, starts, strict=True)
    ]


def apply(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], plan: str) -> Tensor:
    """As `stacked_linear.stacked_lora_linear`, for a weight and a bias that need no gradient, and at least one tier."""
    rows = x if any(tier.tells_groups_apart for tier in tiers) else x.reshape(1, -1, x.shape[-1])
    y: Tensor = stacked_lora_linear(
        rows,
        weight,
        bias,
        [tier.A for tier in tiers],
        [tier.B for tier in tiers],
        [tier.slot for tier in tiers],
        [tier.ranks for tier in tiers],
        [tier.scale for tier in tiers],
        [tier.columns[0] if tier.columns else 0 for tier in tiers],
        [tier.A.requires_grad or tier.B.requires_grad for tier in tiers],
        plan,
    )[0]
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, slots, ranks, *ctx.rest = inputs
    ctx.save_for_backward(output[1], x, weight, *A, *B, *slots, *ranks)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    S, x, weight, *tensors = ctx.saved_tensors
    scales, starts, trained, plan = ctx.rest
    count = len(scales)
    A, B, slots, ranks = (tensors[start : start + count] for start in range(0, 4 * count, count))
    dx = None
    dA: list[Tensor | None] = [None] * count
    dB: list[Tensor | None] = [None] * count
    if dy is not None and torch.is_grad_enabled():

        def again(x: Tensor, *factors: Tensor) -> Tensor:
            tiers = _tiers(factors[:count], factors[count:], slots, ranks, scales, starts)
            return reference.stacked_lora_linear(x, weight, None, tiers)

        dx, *factors = differentiable_gradients(again, (x, *A, *B), dy)
        dA, dB = factors[:count], factors[count:]
    elif dy is not None:
        needs_x = ctx.needs_input_grad[0]
        found = stacked_lora_linear_backward(
            dy, S, x, weight, A, B, slots, ranks, scales, starts, trained, plan, needs_x
        )
        remaining = iter(found)
        dx = next(remaining) if needs_x else None
        for index in range(count):
            if trained[index]:
                dA[index], dB[index] = next(remaining), next(remaining)
    return dx, None, None, dA, dB, _nothing(slots), _nothing(ranks), None, None, None, None


def _nothing(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """No gradients. A list of optional tensors counts as a list of tensors where none of them is missing."""
    return None if any(tensor is None for tensor in tensors) else [None] * len(tensors)


stacked_lora_linear.register_autograd(_backward, setup_context=_setup)


under_autocast("stacked_lora_linear", stacked_lora_linear, cast=3)
