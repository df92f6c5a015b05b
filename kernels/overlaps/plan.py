"""How the kernels of overlaps are launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..launch import Constants, architecture, cdiv, launch, power_of_two, precision
from .reference import ranks_of
from .triton import pairwise_overlaps, penalty_gradient, weighted_grams

PRODUCTS = ("pairwise_overlaps",)


def penalties(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The penalty of each slot `[S]`, and what its gradient needs, in fp32; S = 1 of a side serves all."""
    slots = max(B.shape[1] for B in (active, *frozen))
    constants, _ = _of_penalties(_shape(active), tuple(map(_shape, frozen)))
    value = active.new_empty(len(active), slots, dtype=torch.float32)
    grams = value.new_empty(len(active), slots, len(frozen), constants["MOST"], constants["PADDED"])
    if value.numel():
        launch(
            weighted_grams, (slots, len(active)), active.contiguous(), tuple(B.contiguous() for B in frozen),
            tuple(gammas), value, grams, constants=constants,
        )  # fmt: skip
    return value.sum(0), grams


def penalty_gradients(active: Tensor, frozen: Sequence[Tensor], grams: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of penalties, in the shape and dtype of `active`, from that of each slot's `[S]`."""
    gradient = torch.empty_like(active, memory_format=torch.contiguous_format)
    _, constants = _of_penalties(_shape(active), tuple(map(_shape, frozen)))
    if gradient.numel():
        launch(
            penalty_gradient, (cdiv(active.shape[2], constants["BLOCK"]), active.shape[1], len(active)),
            tuple(B.contiguous() for B in frozen), grams, upstream, gradient, len(upstream), upstream.stride(0),
            constants=constants,
        )  # fmt: skip
    return gradient


def _shape(B: Tensor) -> tuple[int, int, int]:
    """Slots, outputs and ranks."""
    _, slots, out, rank = B.shape
    return slots, out, rank


@cache
def _of_penalties(
    active: tuple[int, int, int], frozen: tuple[tuple[int, int, int], ...]
) -> tuple[Constants, Constants]:
    """The constants of both kernels."""
    slots, out, rank = active
    ranks = tuple(own for _, _, own in frozen)
    few = max(rank, *ranks) <= 16
    both: dict[str, Any] = {
        "OUT": out, "RANK": rank, "PADDED": power_of_two(rank, 16), "RANKS": ranks,
        "MOST": power_of_two(max(ranks), 16),
        "STEPS": tuple(int(own > 1) for own, _, _ in frozen), "BLOCK": 128 if few else 32, "num_warps": 4 if few else 8,
    }  # fmt: skip
    repeats = power_of_two(max(own for own, _, _ in frozen)) if slots == 1 else 1
    return Constants(**both, STEP=int(slots > 1)), Constants(**both, REPEATS=repeats)


def subspace_distances(U: Tensor) -> Tensor:
    """`[N, N]` of bases `[N, P, out, r]` in fp32."""
    clients, projections, out, rank = U.shape
    padded = power_of_two(rank)
    how = precision(torch.float32)
    tile = max(1, (128 if how == "tf32" else 64 if architecture() else 16) // padded)
    tiles = cdiv(clients, tile)
    share = cdiv(projections, max(1, min(projections, 1024 // (tiles * tiles))))  # few clients: more programs
    overlaps = U.new_empty(cdiv(projections, share), clients, clients)
    launch(
        pairwise_overlaps, (tiles, tiles, len(overlaps)), U.contiguous(), ranks_of(U), overlaps, clients,
        constants=Constants(
            P=projections, SHARE=share, OUT=out, RANK=rank, PADDED=padded, TILE=tile, BK=32 if how == "tf32" else 16,
            PRECISION=how, num_warps=8,
        ),
    )  # fmt: skip
    upper = (1 - overlaps.sum(0) / (rank * projections)).clamp_(0, 1).triu_(1)
    return upper + upper.T


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What to compile for a dtype: factors may have any, but kernels compute in fp32."""
    if dtype != torch.float32:
        return

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    for rank in (8, 64):
        active, root, cluster = empty(24, 4, 768, rank), empty(24, 1, 768, rank), empty(24, 4, 768, rank)
        yield f"r {rank} against {rank}, {rank}", partial(_step, active, [root, cluster], [0.1, 0.1])
        yield f"r {rank}", partial(subspace_distances, empty(100, 24, 768, rank))


def _step(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> None:
    """Forward and backward."""
    value, grams = penalties(active, frozen, gammas)
    penalty_gradients(active, frozen, grams, value)
