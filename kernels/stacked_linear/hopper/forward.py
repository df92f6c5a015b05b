"""The forward pass in one kernel."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .tiles import tile_at


@gluon.jit
def _segment(n0, STARTS: gl.constexpr, WIDTHS: gl.constexpr):
    """The segment that column n0 lies in; -1 if none."""
    found = -1
    for c in gl.static_range(len(STARTS)):
        found = gl.where((n0 >= STARTS[c]) & (n0 < STARTS[c] + WIDTHS[c]), c, found)
    return found


@gluon.jit
def _choose(c, NUMBERS: gl.constexpr):
    found = 0
    for i in gl.static_range(len(NUMBERS)):
        found = gl.where(c == i, NUMBERS[i], found)
    return found


@gluon.jit
def _as_b(w, B):
    """The beginning of a buffer for a tile of w, for one of B."""
    R: gl.constexpr = B.block_type.shape[1]
    whole: gl.constexpr = [w.shape[0] * w.shape[1] // R, R]
    return w._reinterpret(B.dtype, whole, B.layout).slice(0, B.block_type.shape[0])


@gluon.jit
def _fetch(
    tensors, buffers, ready, cursor, tiles, STEPS: gl.constexpr, RANKS: gl.constexpr, R: gl.constexpr,
    WIDTH: gl.constexpr, STARTS: gl.constexpr, WIDTHS: gl.constexpr, FIRST: gl.constexpr, TALL: gl.constexpr,
):  # fmt: skip
    """Start the copies of the step at the cursor: its number, its tile, and its number in the tile. Gives the next."""
    x, w, A, B = tensors
    xs, ws, As = buffers
    step, index, k = cursor
    BN: gl.constexpr = w.block_type.shape[0]
    BK: gl.constexpr = w.block_type.shape[1]
    BM: gl.constexpr = x.block_type.shape[1]
    group, block_m, block_n = tile_at(index, tiles, TALL)
    n0 = block_n * BN
    c = _segment(n0, STARTS, WIDTHS)
    place = step % ready.shape[0]
    bar = ready.index(place)
    if (index < tiles[0]) & (k < STEPS):
        mbarrier.expect(bar, x.block_type.nbytes + w.block_type.nbytes + A.block_type.nbytes)
        tma.async_copy_global_to_shared(x, [group, block_m * BM, k * BK], bar, xs.index(place))
        tma.async_copy_global_to_shared(w, [n0, k * BK], bar, ws.index(place))
        tma.async_copy_global_to_shared(A, [group * RANKS + gl.maximum(c, 0) * R, k * BK], bar, As.index(place))
    elif index < tiles[0]:
        mbarrier.expect(bar, B.block_type.nbytes)
        first = group * WIDTH + _choose(c, FIRST) + n0 - _choose(c, STARTS)
        tma.async_copy_global_to_shared(B, [first, 0], bar, _as_b(ws.index(place), B))
    k += 1
    done = k >= STEPS + (c >= 0).to(gl.int32)
    return step + 1, gl.where(done, index + gl.num_programs(0), index), gl.where(done, 0, k)


@gluon.jit
def forward_tiles(
    x,  # [G, M, K]
    w,  # [N, K]
    A,  # [G RANKS, K]
    B,  # [G WIDTH, R]
    y,  # [G, M, N]
    bias,  # [N] or None
    S,  # [G M, RANKS]
    M,
    tiles_m,
    blocks,
    N: gl.constexpr,
    STEPS: gl.constexpr,  # of the inner product of x and w
    RANKS: gl.constexpr,
    R: gl.constexpr,
    WIDTH: gl.constexpr,
    STARTS: gl.constexpr,
    WIDTHS: gl.constexpr,
    FIRST: gl.constexpr,
    TALL: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`S = x Aᵀ` and `y = x Wᵀ + bias + S Bᵀ`, x read once: the tile of S is accumulated beside that of y."""
    BM: gl.constexpr = x.block_type.shape[1]
    BK: gl.constexpr = x.block_type.shape[2]
    BN: gl.constexpr = w.block_type.shape[0]
    HALF: gl.constexpr = y.block_type.shape[2]
    dtype: gl.constexpr = x.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BN, 16])
    thin: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, R, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    xs = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, BK], x.layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], w.layout)
    As = gl.allocate_shared_memory(dtype, [STAGES, R, BK], A.layout)
    out = gl.allocate_shared_memory(dtype, [BN // HALF, 1, BM, HALF], y.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    tensors = (x, w, A, B)
    buffers = (xs, ws, As)
    tiles = (tiles_m * ((N + BN - 1) // BN), tiles_m, blocks)
    cursor = (0, gl.program_id(0), 0)
    for _stage in gl.static_range(STAGES - 1):
        cursor = _fetch(tensors, buffers, ready, cursor, tiles, STEPS, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, TALL)
    step = 0
    for index in range(gl.program_id(0), tiles[0], gl.num_programs(0)):
        group, block_m, block_n = tile_at(index, tiles, TALL)
        n0 = block_n * BN
        c = _segment(n0, STARTS, WIDTHS)
        acc = gl.zeros([BM, BN], gl.float32, wide)
        if c >= 0:
            s = gl.zeros([BM, R], gl.float32, thin)
            for _k in range(STEPS):
                place = step % STAGES
                mbarrier.wait(ready.index(place), step // STAGES & 1)
                left = xs.index(place).reshape([BM, BK])
                acc = warpgroup_mma(left, ws.index(place).permute([1, 0]), acc, is_async=True)
                s = warpgroup_mma(left, As.index(place).permute([1, 0]), s, is_async=True)
                acc, s = warpgroup_mma_wait(2, [acc, s])
                cursor = _fetch(
                    tensors, buffers, ready, cursor, tiles, STEPS, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, TALL
                )
                step += 1
            acc, s = warpgroup_mma_wait(0, [acc, s])
            s16 = s.to(dtype)
            if n0 == _choose(c, STARTS):
                m = block_m * BM + gl.arange(0, BM, gl.SliceLayout(1, thin))
                r = gl.arange(0, R, gl.SliceLayout(0, thin))
                row = (group * M + m).to(gl.int64)
                gl.store(S + row[:, None] * RANKS + c * R + r[None, :], s16, (m < M)[:, None])
            place = step % STAGES
            mbarrier.wait(ready.index(place), step // STAGES & 1)
            b = _as_b(ws.index(place), B)
            acc = warpgroup_mma(gl.convert_layout(s16, operand), b.permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            cursor = _fetch(tensors, buffers, ready, cursor, tiles, STEPS, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, TALL)
            step += 1
        else:
            for _k in range(STEPS):
                place = step % STAGES
                mbarrier.wait(ready.index(place), step // STAGES & 1)
                acc = warpgroup_mma(
                    xs.index(place).reshape([BM, BK]), ws.index(place).permute([1, 0]), acc, is_async=True
                )
                acc = warpgroup_mma_wait(1, [acc])
                cursor = _fetch(
                    tensors, buffers, ready, cursor, tiles, STEPS, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, TALL
                )
                step += 1
            acc = warpgroup_mma_wait(0, [acc])
        if bias is not None:
            n = n0 + gl.arange(0, BN, gl.SliceLayout(0, wide))
            acc += gl.load(bias + n, n < N, other=0.0).to(gl.float32)[None, :]
        tma.store_wait(0)
        y16 = acc.to(dtype)
        if BN == HALF:
            out.index(0).reshape([BM, HALF]).store(y16)
            fence_async_shared()
            tma.async_copy_shared_to_global(y, [group, block_m * BM, n0], out.index(0))
        else:
            low, high = y16.reshape([BM, 2, HALF]).permute([0, 2, 1]).split()
            out.index(0).reshape([BM, HALF]).store(low)
            out.index(1).reshape([BM, HALF]).store(high)
            fence_async_shared()
            tma.async_copy_shared_to_global(y, [group, block_m * BM, n0], out.index(0))
            tma.async_copy_shared_to_global(y, [group, block_m * BM, n0 + HALF], out.index(1))
    tma.store_wait(0)
