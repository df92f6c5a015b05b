"""Rows of x to 8 bits, in Triton, by the kernel that reads x for the adapters' inner product anyway."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton import cast, dot


@triton.jit
def shrink_quantize(
    x,  # [G, M, IN], any strides
    A,  # [G, RANKS, IN]
    S,  # [G M, RANKS]
    values,  # e4m3 [G M, IN]
    of_rows,  # fp32 [G M]
    M,
    stride_xg,
    stride_xm,
    stride_xk,
    IN: tl.constexpr,
    RANKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`S = x Aᵀ`, and x as e4m3 times a scale for each row, as `rounding.quantized` has it."""
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
        tl.store(S + row * RANKS + r[None, :], cast(acc, S.dtype.element_ty, PRECISION), here)
    bits = tl.zeros([BM], tl.int32)  # of absolute values, which are ordered as their bits are, NaN above infinity
    for k0 in range(0, IN, BK):
        k = k0 + tl.arange(0, BK)
        part = tl.load(x + k[None, :] * stride_xk, here & (k < IN)[None, :], other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.max(part.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    finite = bits < 0x7F800000
    bits = tl.maximum(bits, (127 - 100) << 23)
    # What carries a mantissa above 1.75, that of 448, into the exponent; then 2⁸ less.
    bits = ((bits + 0x1FFFFF) & -0x800000) - (8 << 23)
    scale = tl.where(finite, bits.to(tl.float32, bitcast=True), float("nan"))
    tl.store(of_rows + group * M + m, scale, m < M)
    inverse = tl.where(finite, ((254 << 23) - bits).to(tl.float32, bitcast=True), float("nan"))
    for k0 in range(0, IN, BK):
        k = k0 + tl.arange(0, BK)
        part = tl.load(x + k[None, :] * stride_xk, here & (k < IN)[None, :], other=0.0).to(tl.float32)
        rounded = cast(part * inverse[:, None], values.dtype.element_ty, PRECISION)
        tl.store(values + row * IN + k[None, :], rounded, here & (k < IN)[None, :])
