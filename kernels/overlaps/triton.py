"""Overlaps of adapters' column spaces, in Triton: the orthogonality penalty and its gradient, distances of clients.

Both are sums of squared entries of small Gram matrices, which never leave the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weighted_grams(
    active,  # [P, S or 1, OUT, RANK]
    frozen,  # each [P, S or 1, OUT, RANKS[f]]
    gammas,
    value,  # [P, S]
    grams,  # [P, S, frozen, MOST, PADDED]
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,  # RANK, to the next power of two and at least 16
    RANKS: tl.constexpr,
    MOST: tl.constexpr,  # the largest of RANKS, padded likewise
    STEP: tl.constexpr,  # from one slot to the next: 0 where one serves all
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Σ_f γ_f ‖B_fᵀ B‖²` of one projection and slot, and `2 γ_f B_fᵀ B`."""
    s = tl.program_id(0)
    p = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    own = active + (p * (slots if STEP else 1) + s * STEP) * OUT * RANK
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
        target = grams + ((p * slots + s) * len(frozen) + f) * MOST * PADDED
        tl.store(target + j[:, None] * PADDED + i, gram * (2 * gammas[f]))
    tl.store(value + p * slots + s, total)


@triton.jit
def penalty_gradient(
    frozen,  # each [P, S or 1, OUT, RANKS[f]]
    grams,  # [P, S, frozen, MOST, PADDED]
    upstream,  # [S], any stride
    gradient,  # [P, S or 1, OUT, RANK]
    slots,
    stride_u,
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    RANKS: tl.constexpr,
    MOST: tl.constexpr,
    REPEATS: tl.constexpr,  # slots that one B serves, to the next power of two
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Σ_f B_f (2 γ_f B_fᵀ B)` times what comes from above, for some rows of one projection and slot; summed over the
    slots where one B serves all."""
    p = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, PADDED)[None, :]
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.program_id(1)
    tile = tl.zeros([BLOCK, PADDED], tl.float32)
    for step in range(0, REPEATS):
        s = own + step
        there = s < slots
        above = tl.load(upstream + s * stride_u, there, other=0.0).to(tl.float32)
        for f in tl.static_range(len(frozen)):
            other = frozen[f] + (p * (slots if STEPS[f] else 1) + s * STEPS[f]) * OUT * RANKS[f]
            for j0 in tl.range(0, RANKS[f], 16, num_stages=1):
                j = j0 + tl.arange(0, 16)
                inside = (n < OUT)[:, None] & (j < RANKS[f])[None, :] & there
                left = tl.load(other + n[:, None] * RANKS[f] + j[None, :], inside, other=0.0)
                gram = grams + ((p * slots + s) * len(frozen) + f) * MOST * PADDED + j[:, None] * PADDED + i
                gram = tl.load(gram, there, other=0.0)
                tile = tl.dot(left.to(tl.float32), gram * above, tile, input_precision="ieee")
    target = gradient + ((p * tl.num_programs(1) + own) * OUT + n[:, None]) * RANK + i
    tl.store(target, tile.to(gradient.dtype.element_ty), (n < OUT)[:, None] & (i < RANK))


@triton.jit
def pairwise_overlaps(
    U,  # [N, P, OUT, RANK] fp32
    ranks,  # [N, P] fp32, of the bases
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
    """`Σ_p ‖U_ipᵀ U_jp‖² RANK / min(rank_ip, rank_jp)` for a tile of pairs i < j of clients; other places are left as
    they are."""
    if tl.program_id(1) >= tl.program_id(0):
        i = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
        j = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
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
            rank_i = tl.load(ranks + i.to(tl.int64) * P + p, (i < N) & (p < P), other=1.0)
            rank_j = tl.load(ranks + j.to(tl.int64) * P + p, (j < N) & (p < P), other=1.0)
            smaller = tl.maximum(tl.minimum(rank_i, rank_j), 1.0)
            total += tl.sum(tl.sum(squares, 3), 1) * (RANK / smaller)
        overlaps += tl.program_id(2).to(tl.int64) * N * N
        tl.store(overlaps + i.to(tl.int64) * N + j, total, (i < j) & (j < N))
