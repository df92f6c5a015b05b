"""A frozen linear layer with stacked low-rank tiers, in Triton: its products. `tiled` launches them.

G groups of M rows each; a program works on rows of one group only, with that group's adapters. Adapters come packed as
`layout.Layout` says. Products are accumulated in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a b`. Triton's interpreter multiplies 16-bit numbers wrongly, and is told to "upcast" them."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(value, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """`value`, fp32, in another dtype. Triton's interpreter cuts digits off where it should round to bf16 or e4m3."""
    if PRECISION == "upcast" and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    if PRECISION == "upcast" and dtype == tl.float8e4nv:
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        fixed = (value + 24576.0) - 24576.0  # subnormals are multiples of 2⁻⁹, the last digit of 24576 in fp32
        value = tl.where(tl.abs(value) < 0.015625, fixed, rounded)
    return value.to(dtype)


@triton.jit
def shrink_expand(
    x,  # [G, M, IN], any strides
    A,
    B,
    S,  # [G M, RANKS]
    y,  # [G M, OUT]
    M,
    stride_xg,
    stride_xm,
    stride_xk,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    STARTS: tl.constexpr,  # of each segment: its columns of y, and its first row in B
    WIDTHS: tl.constexpr,
    FIRST: tl.constexpr,
    EXPAND: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`S = x Aᵀ`, and with EXPAND also `y += S Bᵀ` in place."""
    blocks = tl.cdiv(M, BM)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    here = (m < M)[:, None]
    row = (group * M + m)[:, None]
    x += group * stride_xg + m[:, None].to(tl.int64) * stride_xm
    for j in range(0, RANKS, CHUNK):
        r = j + tl.arange(0, CHUNK)
        acc = tl.zeros([BM, CHUNK], tl.float32)
        for k0 in range(0, IN, BK):
            k = k0 + tl.arange(0, BK)
            left = tl.load(x + k[None, :] * stride_xk, here & (k < IN)[None, :], other=0.0)
            right = tl.load(A + (group * RANKS + r[None, :]) * IN + k[:, None], (k < IN)[:, None], other=0.0)
            acc = dot(left, right, acc, PRECISION)
        s = cast(acc, S.dtype.element_ty, PRECISION)
        tl.store(S + row * RANKS + r[None, :], s, here)
        if EXPAND:
            for c in tl.static_range(len(STARTS)):
                if (c * R < j + CHUNK) & (c * R + R > j):
                    in_segment = ((r >= c * R) & (r < c * R + R))[:, None]
                    for n0 in tl.range(0, WIDTHS[c], BN, num_stages=STAGES):
                        n = (n0 + tl.arange(0, BN))[None, :]
                        source = (group * WIDTH + FIRST[c] + n) * R + (r - c * R)[:, None]
                        right = tl.load(B + source, in_segment & (n < WIDTHS[c]), other=0.0)
                        target = y + row * OUT + STARTS[c] + n
                        tile = tl.load(target, here & (n < WIDTHS[c]), other=0.0).to(tl.float32)
                        tile = dot(s, right, tile, PRECISION)
                        tl.store(target, cast(tile, y.dtype.element_ty, PRECISION), here & (n < WIDTHS[c]))
                    tl.debug_barrier()  # the next segment may add to the same columns


@triton.jit
def backward_rows(
    dy,  # [G, M, OUT], any strides
    x,  # [G, M, IN], any strides
    A,
    B,
    S,  # [G M, RANKS]
    dx,  # [G M, IN]
    dS,  # [G M, RANKS]
    dA,  # [programs, segments, TRAINED, IN] fp32
    dB,  # [programs, WIDTH, TRAINED] fp32
    M,
    stride_yg,
    stride_ym,
    stride_yn,
    stride_xg,
    stride_xm,
    stride_xk,
    IN: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    TRAINED: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    FIRST: tl.constexpr,
    KEEP: tl.constexpr,
    EXPAND: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """In one pass over dY: `dS = dY B`, and of the ranks in training `dYᵀ S` and `dSᵀ x`, a part for each program.

    With KEEP it writes dS, with EXPAND it writes `dS A` to dX.
    """
    blocks = tl.cdiv(M, BM)
    program = tl.program_id(0).to(tl.int64)
    group = program // blocks
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    here = (m < M)[:, None]
    row = (group * M + m)[:, None]
    dy += group * stride_yg + m[:, None].to(tl.int64) * stride_ym
    x += group * stride_xg + m[:, None].to(tl.int64) * stride_xm
    for j in range(0, RANKS, CHUNK):
        r = j + tl.arange(0, CHUNK)
        acc = tl.zeros([BM, CHUNK], tl.float32)
        if TRAINED > 0:
            s = tl.load(S + row * RANKS + r[None, :], here, other=0.0)
        for c in tl.static_range(len(STARTS)):
            if (c * R < j + CHUNK) & (c * R + R > j):
                i = (r - c * R)[None, :]
                for n0 in range(0, WIDTHS[c], BN):
                    n = n0 + tl.arange(0, BN)
                    inside = n < WIDTHS[c]
                    left = tl.load(dy + (STARTS[c] + n)[None, :] * stride_yn, here & inside[None, :], other=0.0)
                    source = (group * WIDTH + FIRST[c] + n[:, None]) * R + i
                    right = tl.load(B + source, inside[:, None] & (i >= 0) & (i < R), other=0.0)
                    acc = dot(left, right, acc, PRECISION)
                    if TRAINED > 0:  # for chunks without such ranks, too: where a branch is taken at run time, Triton
                        # refills the buffer of `left` before it is read once more
                        part = dot(tl.trans(left), s, tl.zeros([BN, CHUNK], tl.float32), PRECISION)
                        target = (program * WIDTH + FIRST[c] + n[:, None]) * TRAINED + i
                        tl.store(dB + target, part, inside[:, None] & (i >= 0) & (i < TRAINED))
        ds = cast(acc, dy.dtype.element_ty, PRECISION)
        if KEEP:
            tl.store(dS + row * RANKS + r[None, :], ds, here)
        if EXPAND or TRAINED > 0:
            for k0 in tl.range(0, IN, BK, num_stages=STAGES):
                k = k0 + tl.arange(0, BK)
                if EXPAND:
                    right = tl.load(A + (group * RANKS + r[:, None]) * IN + k[None, :], (k < IN)[None, :], other=0.0)
                    target = dx + row * IN + k[None, :]
                    if RANKS > CHUNK:
                        tile = tl.load(target, here & (k < IN)[None, :] & (j > 0), other=0.0).to(tl.float32)
                    else:
                        tile = tl.zeros([BM, BK], tl.float32)
                    tile = dot(ds, right, tile, PRECISION)
                    tl.store(target, cast(tile, dx.dtype.element_ty, PRECISION), here & (k < IN)[None, :])
                if TRAINED > 0:
                    left = tl.load(x + k[None, :] * stride_xk, here & (k < IN)[None, :], other=0.0)
                    part = dot(tl.trans(left), ds, tl.zeros([BK, CHUNK], tl.float32), PRECISION)
                    own = (r % R < TRAINED) & (r // R < len(STARTS))
                    target = ((program * len(STARTS) + r // R) * TRAINED + r % R)[None, :] * IN + k[:, None]
                    tl.store(dA + target, part, own[None, :] & (k < IN)[:, None])
            tl.debug_barrier()  # the next chunk of ranks adds to the same dX


@triton.jit
def gemm(
    x,  # [G, M, K], any strides
    w,  # [N, K], any strides
    of_x,  # fp32 [G M], scales of x; None where it has none
    of_w,  # fp32 [N], those of w
    bias,  # [N] or None
    S,  # [G M, RANKS]
    B,  # its columns n, ranks r, any strides
    y,  # [G M, N]
    M,
    stride_xg,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bg,
    stride_bn,
    stride_br,
    N: tl.constexpr,
    K: tl.constexpr,
    RANKS: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    STARTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TALL: tl.constexpr,
):
    """`y = x Wᵀ + bias + S Bᵀ`: the low-rank part is one more step of the product's accumulator."""
    blocks = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    tiles_m = tl.num_programs(0) // tiles_n
    # Tiles near to each other in both directions run at the same time: they find x and w in the L2 cache.
    band = tl.program_id(0) // (TALL * tiles_n)
    height = tl.minimum(tiles_m - band * TALL, TALL)
    tile_m = band * TALL + (tl.program_id(0) % (TALL * tiles_n)) % height
    n0 = (tl.program_id(0) % (TALL * tiles_n)) // height * BN
    group = (tile_m // blocks).to(tl.int64)
    m = (tile_m % blocks) * BM + tl.arange(0, BM)
    here = (m < M)[:, None]
    row = (group * M + m)[:, None]
    n = n0 + tl.arange(0, BN)
    there = (n < N)[None, :]
    x += group * stride_xg + m[:, None].to(tl.int64) * stride_xm
    w += n[None, :].to(tl.int64) * stride_wn
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if K % BK == 0:
            left = tl.load(x + k[None, :] * stride_xk, here, other=0.0)
            right = tl.load(w + k[:, None] * stride_wk, there, other=0.0)
        else:
            left = tl.load(x + k[None, :] * stride_xk, here & (k < K)[None, :], other=0.0)
            right = tl.load(w + k[:, None] * stride_wk, there & (k < K)[:, None], other=0.0)
        acc = dot(left, right, acc, PRECISION)
    if of_x is not None:
        rows = tl.load(of_x + group * M + m, m < M, other=0.0)
        acc *= rows[:, None] * tl.load(of_w + n, n < N, other=0.0)[None, :]
    for c in tl.static_range(len(STARTS)):
        if (n0 < STARTS[c] + WIDTHS[c]) & (n0 + BN > STARTS[c]):
            column = (n - STARTS[c])[None, :]
            inside = (column >= 0) & (column < WIDTHS[c])
            for j in range(0, R, CHUNK):
                r = j + tl.arange(0, CHUNK)
                left = tl.load(S + row * RANKS + (c * R + r)[None, :], here, other=0.0)
                source = B + group * stride_bg + (FIRST[c] + column) * stride_bn + r[:, None] * stride_br
                acc = dot(left, tl.load(source, inside, other=0.0), acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + n, n < N, other=0.0)[None, :].to(tl.float32)
    tl.store(y + row * N + n[None, :], cast(acc, y.dtype.element_ty, PRECISION), here & there)
