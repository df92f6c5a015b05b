"""The Triton implementations as operators of torch: traced by torch.compile, recomputed by checkpoints, captured in
CUDA graphs, differentiated, and cast under autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import gram, tiled
from .layout import Layout
from .tier import Tier


@torch.library.custom_op("hilora::stacked_lora_linear", mutates_args=())
def stacked_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    scales: Sequence[float],
    starts: Sequence[int],
    trained: Sequence[bool],
    plan: str,
) -> tuple[Tensor, Tensor]:
    """y `[G, M, out]`, and what its backward pass needs of the adapters' inner product."""
    with torch.cuda.device_of(x):
        return tiled.forward(x, weight, bias, _tiers(A, B, slots, scales, starts), trained, plan)


@stacked_lora_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Sequence[Tensor], B: Sequence[Tensor],
    slots: Sequence[Tensor | None], scales: Sequence[float], starts: Sequence[int], trained: Sequence[bool], plan: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = Layout.of(_tiers(A, B, slots, scales, starts), trained, weight.shape[0], x.dtype)
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
    scales: Sequence[float],
    starts: Sequence[int],
    trained: Sequence[bool],
    plan: str,
    needs_x: bool,
) -> list[Tensor]:
    """dx if it is needed, and dA, dB of each tier in training."""
    with torch.cuda.device_of(x):
        tiers = _tiers(A, B, slots, scales, starts)
        dx, factors = tiled.backward(dy, S, x, weight, tiers, trained, plan, needs_x)
    return factors if dx is None else [dx, *factors]


@stacked_lora_linear_backward.register_fake
def _(
    dy: Tensor, S: Tensor, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor],
    slots: Sequence[Tensor | None], scales: Sequence[float], starts: Sequence[int], trained: Sequence[bool], plan: str,
    needs_x: bool,
) -> list[Tensor]:  # fmt: skip
    factors = [factor for pair, own in zip(zip(A, B, strict=True), trained, strict=True) if own for factor in pair]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in ([x] if needs_x else []) + factors]


def _tiers(
    A: Sequence[Tensor], B: Sequence[Tensor], slots: Sequence[Tensor | None], scales: Sequence[float],
    starts: Sequence[int],
) -> list[Tier]:  # fmt: skip
    return [
        Tier(a, b, scale, slot, (start, int(b.shape[1])))
        for a, b, slot, scale, start in zip(A, B, slots, scales, starts, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, slots, *ctx.rest = inputs
    ctx.save_for_backward(output[1], x, weight, *A, *B, *slots)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    S, x, weight, *tensors = ctx.saved_tensors
    scales, starts, trained, plan = ctx.rest
    count = len(scales)
    A, B, slots = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    dx = None
    dA: list[Tensor | None] = [None] * count
    dB: list[Tensor | None] = [None] * count
    if dy is not None:
        needs_x = ctx.needs_input_grad[0]
        found = stacked_lora_linear_backward(dy, S, x, weight, A, B, slots, scales, starts, trained, plan, needs_x)
        remaining = iter(found)
        dx = next(remaining) if needs_x else None
        for index in range(count):
            if trained[index]:
                dA[index], dB[index] = next(remaining), next(remaining)
    # A list of optional tensors counts as a list of tensors where none of them is missing.
    no_slots = None if any(slot is None for slot in slots) else [None] * count
    return dx, None, None, dA, dB, no_slots, None, None, None, None


stacked_lora_linear.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("hilora::gram_penalty", mutates_args=())
def gram_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The penalty of each slot `[S]`, and its gradient `[P, S, out, r]`."""
    with torch.cuda.device_of(active):
        return gram.penalties(active, frozen, gammas)


@gram_penalty.register_fake
def _(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    count, _, out, rank = active.shape
    slots = max(B.shape[1] for B in (active, *frozen))
    return (
        active.new_empty(slots, dtype=torch.float32),
        active.new_empty(count, slots, out, rank, dtype=torch.float32),
    )


def _setup_penalty(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.like = inputs[0].shape[1], inputs[0].dtype, len(inputs[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _penalty_backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, list[None], None]:
    slots, dtype, frozen = ctx.like
    nothing: list[None] = [None] * frozen
    if upstream is None:
        return None, nothing, None
    (gradient,) = ctx.saved_tensors
    gradient = gradient * upstream[:, None, None]
    return (gradient if slots == gradient.shape[1] else gradient.sum(1, keepdim=True)).to(dtype), nothing, None


gram_penalty.register_autograd(_penalty_backward, setup_context=_setup_penalty)


@torch.library.custom_op("hilora::subspace_distances", mutates_args=())
def subspace_distances(U: Tensor) -> Tensor:
    """`[N, N]` of bases `[N, P, out, r]` in fp32."""
    with torch.cuda.device_of(U):
        return gram.subspace_distances(U)


@subspace_distances.register_fake
def _(U: Tensor) -> Tensor:
    return U.new_empty(U.shape[0], U.shape[0])


LIBRARY = torch.library.Library("hilora", "FRAGMENT")


def _cast(operator: Callable[..., Any], device: str, narrow: int) -> Callable[..., Any]:
    """The operator outside of autocast, its first few arguments in the dtype of autocast."""

    def under_autocast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args[:narrow]]
        with torch.autocast(device, enabled=False):
            return operator(*cast, *args[narrow:])

    return under_autocast


for key, device in (("AutocastCUDA", "cuda"), ("AutocastCPU", "cpu")):
    LIBRARY.impl("stacked_lora_linear", _cast(stacked_lora_linear, device, narrow=3), key)
    LIBRARY.impl("gram_penalty", _cast(gram_penalty, device, narrow=0), key)
    LIBRARY.impl("subspace_distances", _cast(subspace_distances, device, narrow=0), key)
