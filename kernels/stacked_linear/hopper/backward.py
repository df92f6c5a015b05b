"""The backward pass in one kernel."""

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
def _multiply(buffers, ready, step, acc, acc_thin):
    """The products with w of a step whose copies have arrived, begun."""
    dys, ws, ws_thin, _ = buffers
    place = step % ready.shape[0]
    mbarrier.wait(ready.index(place), step // ready.shape[0] & 1)
    left = dys.index(place).reshape([dys.shape[2], dys.shape[3]])
    acc = warpgroup_mma(left, ws.index(place), acc, is_async=True)
    acc_thin = warpgroup_mma(left, ws_thin.index(place), acc_thin, is_async=True)
    return left, place, acc, acc_thin


@gluon.jit
def _fetch(
    tensors, buffers, ready, cursor, tiles, RANKS: gl.constexpr, R: gl.constexpr, WIDTH: gl.constexpr,
    STARTS: gl.constexpr, WIDTHS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, TALL: gl.constexpr,
):  # fmt: skip
    """Start the copies of the step at the cursor: its number, its tile, and its number in the tile. Gives the next.

    After the steps of a segment comes one that has its tile of A, in the buffers of w; then those of the next segment;
    last the columns outside of all.
    """
    dy, w, w_thin, A, A_thin, B = tensors
    dys, ws, ws_thin, Bs = buffers
    step, index, k = cursor
    BM: gl.constexpr = dy.block_type.shape[1]
    BK: gl.constexpr = dy.block_type.shape[2]
    BN: gl.constexpr = w.block_type.shape[1]
    THIN: gl.constexpr = w_thin.block_type.shape[1]
    group, block_m, block_n = tile_at(index, tiles, TALL)
    n0 = block_n * (BN + THIN)
    place = step % ready.shape[0]
    bar = ready.index(place)
    steps = 0
    column = 0
    row = 0
    ended = -1
    for c in gl.static_range(len(STARTS)):
        inside = (k >= steps) & (k <= steps + WIDTHS[c] // BK)
        column = gl.where(inside, STARTS[c] + (k - steps) * BK, column)
        row = gl.where(inside, FIRST[c] + (k - steps) * BK, row)
        ended = gl.where(k == steps + WIDTHS[c] // BK, c, ended)
        steps += WIDTHS[c] // BK + 1
    in_segment = k < steps
    for i in gl.static_range(len(REST)):
        column = gl.where(k >= steps, REST[i][0] + (k - steps) * BK, column)
        steps += (REST[i][1] + BK - 1) // BK
    tile_bytes: gl.constexpr = dy.block_type.nbytes + w.block_type.nbytes + w_thin.block_type.nbytes
    if (index < tiles[0]) & (ended >= 0):
        mbarrier.expect(bar, A.block_type.nbytes + A_thin.block_type.nbytes)
        first = group * RANKS + ended * R
        tma.async_copy_global_to_shared(A, [first, n0], bar, ws.index(place).slice(0, R))
        tma.async_copy_global_to_shared(A_thin, [first, n0 + BN], bar, ws_thin.index(place).slice(0, R))
    elif index < tiles[0]:
        if in_segment:
            mbarrier.expect(bar, tile_bytes + B.block_type.nbytes)
            tma.async_copy_global_to_shared(B, [group * WIDTH + row, 0], bar, Bs.index(place))
        else:
            mbarrier.expect(bar, tile_bytes)
        tma.async_copy_global_to_shared(dy, [group, block_m * BM, column], bar, dys.index(place))
        tma.async_copy_global_to_shared(w, [column, n0], bar, ws.index(place))
        tma.async_copy_global_to_shared(w_thin, [column, n0 + BN], bar, ws_thin.index(place))
    k += 1
    return step + 1, gl.where(k >= steps, index + gl.num_programs(0), index), gl.where(k >= steps, 0, k)


@gluon.jit
def _steps(
    count, tensors, buffers, ready, cursor, tiles, step, acc, acc_thin, dS, RANKS: gl.constexpr, R: gl.constexpr,
    WIDTH: gl.constexpr, STARTS: gl.constexpr, WIDTHS: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr,
    TALL: gl.constexpr,
):  # fmt: skip
    """The steps of a segment: products with w and with B."""
    for _k in range(count):
        left, place, acc, acc_thin = _multiply(buffers, ready, step, acc, acc_thin)
        dS = warpgroup_mma(left, buffers[3].index(place), dS, is_async=True)
        acc, acc_thin, dS = warpgroup_mma_wait(3, [acc, acc_thin, dS])
        cursor = _fetch(tensors, buffers, ready, cursor, tiles, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, REST, TALL)
        step += 1
    acc, acc_thin, dS = warpgroup_mma_wait(0, [acc, acc_thin, dS])
    return cursor, step, acc, acc_thin, dS


@gluon.jit
def backward_tiles(
    dy,  # [G, M, OUT]
    w,  # [OUT, IN], in wide boxes of columns and in thin ones
    w_thin,
    A,  # [G RANKS, IN], likewise
    A_thin,
    B,  # [G WIDTH, R]
    S,  # [G, M, RANKS]
    x,  # [G, M, IN]
    dx,  # [G, M, IN]
    dA,  # [blocks of rows, segments, TRAINED, IN] fp32
    dB,  # [blocks of rows, WIDTH, TRAINED] fp32
    tiles_m,
    blocks,
    IN: gl.constexpr,
    RANKS: gl.constexpr,
    R: gl.constexpr,
    WIDTH: gl.constexpr,
    TRAINED: gl.constexpr,
    STARTS: gl.constexpr,
    WIDTHS: gl.constexpr,
    FIRST: gl.constexpr,
    REST: gl.constexpr,  # columns of dy outside of all segments: starts and widths
    TALL: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`dX = dY W + dS A` with `dS = dY B`, and of the ranks in training `dYᵀ S` and `dSᵀ x`, a part for each block of
    rows; dY read once."""
    BM: gl.constexpr = dy.block_type.shape[1]
    BK: gl.constexpr = dy.block_type.shape[2]
    BN: gl.constexpr = w.block_type.shape[1]
    THIN: gl.constexpr = w_thin.block_type.shape[1]
    dtype: gl.constexpr = dy.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BN, 16])
    thin: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, THIN, 16])
    low: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, R, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, num_warps // 4], [16, R // (num_warps // 4), 16])
    dys = gl.allocate_shared_memory(dtype, [STAGES, 1, BM, BK], dy.layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], w.layout)
    ws_thin = gl.allocate_shared_memory(dtype, [STAGES, BK, THIN], w_thin.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, BK, R], B.layout)
    out = gl.allocate_shared_memory(dtype, [BN // THIN + 1, 1, BM, THIN], dx.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    if TRAINED > 0:
        s = gl.allocate_shared_memory(dtype, [1, BM, R], S.layout)
        dSs = gl.allocate_shared_memory(dtype, [len(STARTS), 1, BM, R], S.layout)
        s_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(s_ready, count=1)
        x_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(x_ready, count=1)
    tiles_n: gl.constexpr = (IN + BN + THIN - 1) // (BN + THIN)
    tensors = (dy, w, w_thin, A, A_thin, B)
    buffers = (dys, ws, ws_thin, Bs)
    tiles = (tiles_m * tiles_n, tiles_m, blocks)
    cursor = (0, gl.program_id(0), 0)
    for _stage in gl.static_range(STAGES - 1):
        cursor = _fetch(tensors, buffers, ready, cursor, tiles, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, REST, TALL)
    step = 0
    s_uses = 0
    x_uses = 0
    for index in range(gl.program_id(0), tiles[0], gl.num_programs(0)):
        group, block_m, block_n = tile_at(index, tiles, TALL)
        n0 = block_n * (BN + THIN)
        program = (group * blocks + block_m).to(gl.int64)
        acc = gl.zeros([BM, BN], gl.float32, wide)
        acc_thin = gl.zeros([BM, THIN], gl.float32, thin)
        tma.store_wait(0)
        if TRAINED > 0:
            mbarrier.expect(x_ready, (BN // THIN + 1) * x.block_type.nbytes)
            for piece in gl.static_range(BN // THIN + 1):
                first = [group, block_m * BM, n0 + piece * THIN]
                tma.async_copy_global_to_shared(x, first, x_ready, out.index(piece))
        for c in gl.static_range(len(STARTS)):
            dS = gl.zeros([BM, R], gl.float32, low)
            if TRAINED == 0:
                cursor, step, acc, acc_thin, dS = _steps(
                    WIDTHS[c] // BK, tensors, buffers, ready, cursor, tiles, step, acc, acc_thin, dS, RANKS, R, WIDTH,
                    STARTS, WIDTHS, FIRST, REST, TALL,
                )  # fmt: skip
            elif block_n == c % tiles_n:
                mbarrier.expect(s_ready, S.block_type.nbytes)
                tma.async_copy_global_to_shared(S, [group, block_m * BM, c * R], s_ready, s)
                mbarrier.wait(s_ready, s_uses & 1)
                s_uses += 1
                for k in range(WIDTHS[c] // BK):
                    left, place, acc, acc_thin = _multiply(buffers, ready, step, acc, acc_thin)
                    dS = warpgroup_mma(left, Bs.index(place), dS, is_async=True)
                    none = gl.zeros([BK, R], gl.float32, part)
                    own = warpgroup_mma(left.permute([1, 0]), s.reshape([BM, R]), none, is_async=True)
                    acc, acc_thin, dS, own = warpgroup_mma_wait(0, [acc, acc_thin, dS, own])
                    n = k * BK + gl.arange(0, BK, gl.SliceLayout(1, part))
                    r = gl.arange(0, R, gl.SliceLayout(0, part))
                    target = (program * WIDTH + FIRST[c] + n)[:, None] * TRAINED + r[None, :]
                    gl.store(dB + target, own, (r < TRAINED)[None, :])
                    cursor = _fetch(
                        tensors, buffers, ready, cursor, tiles, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, REST, TALL
                    )
                    step += 1
            else:
                cursor, step, acc, acc_thin, dS = _steps(
                    WIDTHS[c] // BK, tensors, buffers, ready, cursor, tiles, step, acc, acc_thin, dS, RANKS, R, WIDTH,
                    STARTS, WIDTHS, FIRST, REST, TALL,
                )  # fmt: skip
            dS16 = dS.to(dtype)
            if TRAINED > 0:
                dSs.index(c).reshape([BM, R]).store(dS16)
                fence_async_shared()
            place = step % STAGES
            mbarrier.wait(ready.index(place), step // STAGES & 1)
            rows = gl.convert_layout(dS16, gl.DotOperandLayout(0, wide, 2))
            acc = warpgroup_mma(rows, ws.index(place).slice(0, R), acc, is_async=True)
            rows_thin = gl.convert_layout(dS16, gl.DotOperandLayout(0, thin, 2))
            acc_thin = warpgroup_mma(rows_thin, ws_thin.index(place).slice(0, R), acc_thin, is_async=True)
            acc, acc_thin = warpgroup_mma_wait(0, [acc, acc_thin])
            cursor = _fetch(tensors, buffers, ready, cursor, tiles, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, REST, TALL)
            step += 1
        for i in gl.static_range(len(REST)):
            for _k in range((REST[i][1] + BK - 1) // BK):
                left, place, acc, acc_thin = _multiply(buffers, ready, step, acc, acc_thin)
                acc, acc_thin = warpgroup_mma_wait(2, [acc, acc_thin])
                cursor = _fetch(
                    tensors, buffers, ready, cursor, tiles, RANKS, R, WIDTH, STARTS, WIDTHS, FIRST, REST, TALL
                )
                step += 1
        acc, acc_thin = warpgroup_mma_wait(0, [acc, acc_thin])
        if TRAINED > 0:
            mbarrier.wait(x_ready, x_uses & 1)
            x_uses += 1
            for piece in gl.static_range(BN // THIN + 1):
                for c in gl.static_range(len(STARTS)):
                    none = gl.zeros([THIN, R], gl.float32, part)
                    right = dSs.index(c).reshape([BM, R])
                    own = warpgroup_mma(
                        out.index(piece).reshape([BM, THIN]).permute([1, 0]), right, none, is_async=True
                    )
                    own = warpgroup_mma_wait(0, [own])
                    n = n0 + piece * THIN + gl.arange(0, THIN, gl.SliceLayout(1, part))
                    r = gl.arange(0, R, gl.SliceLayout(0, part))
                    target = ((program * len(STARTS) + c) * TRAINED + r)[None, :] * IN + n[:, None]
                    gl.store(dA + target, own, (n < IN)[:, None] & (r < TRAINED)[None, :])
        low_half, high_half = acc.to(dtype).reshape([BM, 2, THIN]).permute([0, 2, 1]).split()
        out.index(0).reshape([BM, THIN]).store(low_half)
        out.index(1).reshape([BM, THIN]).store(high_half)
        out.index(2).reshape([BM, THIN]).store(acc_thin.to(dtype))
        fence_async_shared()
        for piece in gl.static_range(BN // THIN + 1):
            tma.async_copy_shared_to_global(dx, [group, block_m * BM, n0 + piece * THIN], out.index(piece))
    tma.store_wait(0)
