"""The Triton kernels of overlaps as operators of torch: traced by torch.compile, recomputed by checkpoints, captured in
CUDA graphs, differentiated, and kept out of autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import power_of_two, under_autocast
from ..twice import differentiable_gradients
from . import plan, reference


@torch.library.custom_op("hilora::gram_penalty", mutates_args=())
def gram_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The penalty of each slot `[S]`, and the Gram matrices that its gradient needs."""
    with torch.cuda.device_of(active):
        return plan.penalties(active, frozen, gammas)


@gram_penalty.register_fake
def _(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    slots = max(B.shape[1] for B in (active, *frozen))
    padded, most = (power_of_two(rank, 16) for rank in (active.shape[3], max(B.shape[3] for B in frozen)))
    return (
        active.new_empty(slots, dtype=torch.float32),
        active.new_empty(len(active), slots, len(frozen), most, padded, dtype=torch.float32),
    )


@torch.library.custom_op("hilora::gram_penalty_backward", mutates_args=())
def gram_penalty_backward(active: Tensor, frozen: Sequence[Tensor], grams: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of `active`, from that of each slot's penalty `[S]`."""
    with torch.cuda.device_of(active):
        return plan.penalty_gradients(active, frozen, grams, upstream)


@gram_penalty_backward.register_fake
def _(active: Tensor, frozen: Sequence[Tensor], grams: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(active, memory_format=torch.contiguous_format)


def _setup_penalty(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    active, frozen, ctx.gammas = inputs
    ctx.save_for_backward(output[1], active, *frozen)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _penalty_backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, list[None], None]:
    grams, active, *frozen = ctx.saved_tensors
    nothing: list[None] = [None] * len(frozen)
    if upstream is None:
        return None, nothing, None
    if torch.is_grad_enabled():

        def again(active: Tensor) -> Tensor:
            return reference.gram_penalty(active, frozen, ctx.gammas, per_slot=True)

        return differentiable_gradients(again, [active], upstream)[0], nothing, None
    return gram_penalty_backward(active, frozen, grams, upstream), nothing, None


gram_penalty.register_autograd(_penalty_backward, setup_context=_setup_penalty)


@torch.library.custom_op("hilora::subspace_distances", mutates_args=())
def subspace_distances(U: Tensor) -> Tensor:
    """`[N, N]` of bases `[N, P, out, r]` in fp32."""
    with torch.cuda.device_of(U):
        return plan.subspace_distances(U)


@subspace_distances.register_fake
def _(U: Tensor) -> Tensor:
    return U.new_empty(U.shape[0], U.shape[0])


under_autocast("gram_penalty", gram_penalty)
under_autocast("subspace_distances", subspace_distances)
