"""Overlaps of adapters' column spaces, in Triton: the orthogonality penalty and its gradient, distances of clients.

Both are sums of squared entries of small Gram matrices, which never leave the registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture, cdiv, launch, precision
from .layout import power_of_two


@triton.jit
def penalty_and_gradient(
    active,  # [P, S or 1, OUT, RANK]
    frozen,  # each [P, S or 1, OUT, RANKS[f]]
    gammas,
    value,  # [P, S]
    gradient,  # [P, S, OUT, RANK]
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,  # RANK, to the next power of two and at least 16
    RANKS: tl.constexpr,
    MOST: tl.constexpr,  # the largest of RANKS, padded likewise
    STEP: tl.constexpr,  # from one slot to the next: 0 where one serves all
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Σ_f γ_f ‖B_fᵀ B‖²` of one projection and slot, and `2 Σ_f γ_f B_f (B_fᵀ B)`."""
    s = tl.program_id(0)
    p = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    own = active + (p * (slots if STEP else 1) + s * STEP) * OUT * RANK
    gradient += (p * slots + s) * OUT * RANK
    i = tl.arange(0, PADDED)[None, :]
    j = tl.arange(0, MOST)
    total = 0.0
    for f in tl.static_range(len(frozen)):
        other = frozen[f] + (p * (slots if STEPS[f] else 1) + s * STEPS[f]) * OUT * RANKS[f]
        gram = tl.zeros([MOST, PADDED], tl.float32)
        for n0 in range(0, OUT, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            left = tl.load(
                other + n[None, :] * RANKS[f] + j[:, None], (n < OUT)[None, :] & (j < RANKS[f])[:, None], other=0.0
            )
            right = tl.load(own + n[:, None] * RANK + i, (n < OUT)[:, None] & (i < RANK), other=0.0)
            gram = tl.dot(left.to(tl.float32), right.to(tl.float32), gram, input_precision="ieee")
        total += gammas[f] * tl.sum(gram * gram)
        for n0 in range(0, OUT, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            left = tl.load(
                other + n[:, None] * RANKS[f] + j[None, :], (n < OUT)[:, None] & (j < RANKS[f])[None, :], other=0.0
            )
            tile = tl.dot(left.to(tl.float32), gram, input_precision="ieee") * (2 * gammas[f])
            target = gradient + n[:, None] * RANK + i
            inside = (n < OUT)[:, None] & (i < RANK)
            if f > 0:
                tile += tl.load(target, inside, other=0.0)
            tl.store(target, tile, inside)
        tl.debug_barrier()
    tl.store(value + p * slots + s, total)


@triton.jit
def pairwise_overlaps(
    U,  # [N, P, OUT, RANK] fp32
    overlaps,  # [programs of axis 2, N, N]
    N,
    P: tl.constexpr,
    SHARE: tl.constexpr,  # projections of a program
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,  # ranks, to the next power of two
    TILE: tl.constexpr,  # clients
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Σ_p ‖U_ipᵀ U_jp‖²` for a tile of pairs i < j of clients; other places are left as they are."""
    if tl.program_id(1) >= tl.program_id(0):
        row = tl.arange(0, TILE * PADDED)
        rank = row % PADDED
        left_client = tl.program_id(0) * TILE + row // PADDED
        right_client = tl.program_id(1) * TILE + row // PADDED
        left_here = ((left_client < N) & (rank < RANK))[:, None]
        right_here = ((right_client < N) & (rank < RANK))[None, :]
        total = tl.zeros([TILE, TILE], tl.float32)
        for step in range(0, SHARE):
            p = tl.program_id(2) * SHARE + step
            left = U + (left_client.to(tl.int64) * P + p)[:, None] * (OUT * RANK) + rank[:, None]
            right = U + (right_client.to(tl.int64) * P + p)[None, :] * (OUT * RANK) + rank[None, :]
            gram = tl.zeros([TILE * PADDED, TILE * PADDED], tl.float32)
            for k0 in range(0, OUT, BK):
                k = k0 + tl.arange(0, BK)
                inside = k < tl.where(p < P, OUT, 0)
                a = tl.load(left + k[None, :] * RANK, left_here & inside[None, :], other=0.0)
                b = tl.load(right + k[:, None] * RANK, right_here & inside[:, None], other=0.0)
                gram = tl.dot(a, b, gram, input_precision=PRECISION)
            squares = tl.reshape(gram * gram, [TILE, PADDED, TILE, PADDED])
            total += tl.sum(tl.sum(squares, 3), 1)
        i = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
        j = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
        overlaps += tl.program_id(2).to(tl.int64) * N * N
        tl.store(overlaps + i.to(tl.int64) * N + j, total, (i < j) & (j < N))


def penalties(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The penalty of each slot `[S]`, and its gradient `[P, S, out, r]`, both in fp32; S = 1 of a side serves all."""
    count, _, out, rank = active.shape
    slots = max(B.shape[1] for B in (active, *frozen))
    value = active.new_empty(count, slots, dtype=torch.float32)
    gradient = active.new_empty(count, slots, out, rank, dtype=torch.float32)
    if value.numel():
        ranks = tuple(B.shape[3] for B in frozen)
        launch(
            penalty_and_gradient, (slots, count), active.contiguous(), tuple(B.contiguous() for B in frozen),
            tuple(gammas), value, gradient, OUT=out, RANK=rank, PADDED=power_of_two(rank, 16), RANKS=ranks,
            MOST=power_of_two(max(ranks), 16), STEP=int(active.shape[1] > 1),
            STEPS=tuple(int(B.shape[1] > 1) for B in frozen), BLOCK=128 if max(rank, *ranks) <= 16 else 32,
        )  # fmt: skip
    return value.sum(0), gradient


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
        pairwise_overlaps, (tiles, tiles, len(overlaps)), U.contiguous(), overlaps, clients, P=projections,
        SHARE=share, OUT=out, RANK=rank, PADDED=padded, TILE=tile, BK=32 if how == "tf32" else 16, PRECISION=how,
        num_warps=8,
    )  # fmt: skip
    upper = (1 - overlaps.sum(0) / (rank * projections)).clamp_(0, 1).triu_(1)
    return upper + upper.T
