"""Instructions on edge cases and random numbers, against Python's integers and fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hilora.kernels.emulator.errors import Fault, Unsupported
from hilora.kernels.emulator.values import Array

from .snippets import each_thread, kernel, run

THREADS = 256
Oracle = Callable[..., Any]


def integers(dtype: str, seed: int) -> Array:
    limits = np.iinfo(dtype)
    edges = [0, 1, 2, 7, 31, 32, 33, limits.max, limits.max - 1, limits.min, limits.min + 1, limits.max // 3]
    random = np.random.default_rng(seed)
    many = random.integers(limits.min, limits.max, THREADS, dtype=dtype, endpoint=True)
    chosen = random.choice(np.array(edges, dtype), THREADS)
    return np.where(random.random(THREADS) < 0.6, chosen, many)


def floats(dtype: str, seed: int) -> Array:
    edges = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 1e-40, 3e38, 1 + 2**-8, 1 + 2**-9, 2.5, -3.5, 65520.0]
    random = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        chosen = random.choice(np.array(edges, np.float64).astype(dtype), THREADS)
        return np.where(random.random(THREADS) < 0.5, chosen, (random.normal(size=THREADS) * 1e3).astype(dtype))


def wrapped(value: int, dtype: str) -> int:
    bits = 8 * np.dtype(dtype).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.dtype(dtype).kind == "i" and value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bit_field(a: int, start: int, length: int, signed: bool) -> int:
    found = (a >> start) & ((1 << length) - 1)
    return found - (1 << length) if signed and length and found >> (length - 1) else found


def permuted(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    found = []
    for index in range(4):
        nibble = selector >> 4 * index & 15
        byte = source[nibble & 7]
        found.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(found, "little")


INTEGERS: list[tuple[str, str, str, Oracle]] = [
    ("add.s32", "i4 i4", "i4", lambda a, b: a + b),
    ("add.s64", "i8 i8", "i8", lambda a, b: a + b),
    ("sub.s32", "i4 i4", "i4", lambda a, b: a - b),
    ("mul.lo.s32", "i4 i4", "i4", lambda a, b: a * b),
    ("mul.lo.s64", "i8 i8", "i8", lambda a, b: a * b),
    ("mul.hi.u16", "u2 u2", "u2", lambda a, b: a * b >> 16),
    ("mul.hi.s32", "i4 i4", "i4", lambda a, b: a * b >> 32),
    ("mul.hi.u32", "u4 u4", "u4", lambda a, b: a * b >> 32),
    ("mul.hi.u64", "u8 u8", "u8", lambda a, b: a * b >> 64),
    ("mul.hi.s64", "i8 i8", "i8", lambda a, b: a * b >> 64),
    ("mul.wide.s32", "i4 i4", "i8", lambda a, b: a * b),
    ("mul.wide.u32", "u4 u4", "u8", lambda a, b: a * b),
    ("mul.wide.u16", "u2 u2", "u4", lambda a, b: a * b),
    ("mad.lo.s32", "i4 i4 i4", "i4", lambda a, b, c: a * b + c),
    ("mad.wide.s32", "i4 i4 i8", "i8", lambda a, b, c: a * b + c),
    ("mad.wide.u16", "u2 u2 u4", "u4", lambda a, b, c: a * b + c),
    ("div.s32", "i4 i4", "i4", quotient),
    ("div.u32", "u4 u4", "u4", quotient),
    ("rem.s32", "i4 i4", "i4", lambda a, b: a - quotient(a, b) * b),
    ("min.s32", "i4 i4", "i4", min),
    ("max.u32", "u4 u4", "u4", max),
    ("and.b32", "u4 u4", "u4", lambda a, b: a & b),
    ("or.b64", "u8 u8", "u8", lambda a, b: a | b),
    ("xor.b16", "u2 u2", "u2", lambda a, b: a ^ b),
    ("not.b32", "u4", "u4", lambda a: ~a),
    ("neg.s32", "i4", "i4", lambda a: -a),
    ("abs.s32", "i4", "i4", abs),
    ("shl.b32", "u4 u4", "u4", lambda a, b: a << b if b < 32 else 0),
    ("shl.b64", "u8 u4", "u8", lambda a, b: a << b if b < 64 else 0),
    ("shr.u32", "u4 u4", "u4", lambda a, b: a >> min(b, 32)),
    ("shr.s32", "i4 u4", "i4", lambda a, b: a >> min(b, 32)),
    ("popc.b32", "u4", "u4", lambda a: a.bit_count()),
    ("clz.b32", "u4", "u4", lambda a: 32 - a.bit_length()),
    ("prmt.b32", "u4 u4 u4", "u4", permuted),
    ("cvt.s64.s32", "i4", "i8", lambda a: a),
    ("cvt.u64.u32", "u4", "u8", lambda a: a),
    ("cvt.u32.u64", "u8", "u4", lambda a: a),
    ("cvt.u16.u32", "u4", "u2", lambda a: a),
    ("cvt.s32.s8", "u2", "i4", lambda a: wrapped(a, "i1")),
    ("cvt.u32.u8", "u2", "u4", lambda a: wrapped(a, "u1")),
]


@pytest.mark.parametrize(("name", "given", "result", "oracle"), INTEGERS, ids=[case[0] for case in INTEGERS])
def test_integers(name: str, given: str, result: str, oracle: Oracle) -> None:
    inputs = [integers(dtype, seed) for seed, dtype in enumerate(given.split())]
    found = each_thread(f"{name} {{d}}, {', '.join(['{a}', '{b}', '{c}'][: len(inputs)])};", inputs, result)
    wanted = [wrapped(oracle(*map(int, row)), result) for row in zip(*inputs, strict=True)]
    assert found.tolist() == wanted


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("start", "length"), [(0, 4), (5, 2), (4, 15), (7, 24), (31, 1), (3, 0)])
def test_bit_fields(start: int, length: int, signed: bool) -> None:
    kind, dtype = ("s32", "i4") if signed else ("u32", "u4")
    a = integers(dtype, 1)
    found = each_thread(f"bfe.{kind} {{d}}, {{a}}, {start}, {length};", [a], dtype)
    assert found.tolist() == [bit_field(int(one), start, length, signed) for one in a]


FLOATS: list[tuple[str, str, str, Callable[..., Array]]] = [
    ("add.f32", "f4 f4", "f4", lambda a, b: a + b),
    ("sub.f32", "f4 f4", "f4", lambda a, b: a - b),
    ("mul.f32", "f4 f4", "f4", lambda a, b: a * b),
    ("fma.rn.f32", "f4 f4 f4", "f4", lambda a, b, c: a * b + c),
    ("div.full.f32", "f4 f4", "f4", lambda a, b: a / b),
    ("min.f32", "f4 f4", "f4", np.fmin),
    ("max.f32", "f4 f4", "f4", np.fmax),
    ("neg.f32", "f4", "f4", np.negative),
    ("abs.f32", "f4", "f4", np.abs),
    ("sqrt.rn.f32", "f4", "f4", np.sqrt),
    ("ex2.approx.f32", "f4", "f4", np.exp2),
    ("cvt.rn.f16.f32", "f4", "f2", lambda a: a),
    ("cvt.f32.f16", "f2", "f4", lambda a: a),
    ("cvt.rn.f32.s32", "i4", "f4", lambda a: a),
]


@pytest.mark.parametrize(("name", "given", "result", "oracle"), FLOATS, ids=[case[0] for case in FLOATS])
def test_floats(name: str, given: str, result: str, oracle: Callable[..., Array]) -> None:
    inputs = [(integers if dtype[0] == "i" else floats)(dtype, seed) for seed, dtype in enumerate(given.split())]
    found = each_thread(f"{name} {{d}}, {', '.join(['{a}', '{b}', '{c}'][: len(inputs)])};", inputs, result)
    with np.errstate(all="ignore"):
        wanted = oracle(*(one.astype(np.float64) for one in inputs)).astype(result)
    np.testing.assert_array_equal(found, wanted)


def nearest_bf16(value: float) -> int:
    """The bits of the bf16 that is nearest in value, the even one of two."""
    if math.isnan(value):
        return 0x7FFF
    low = int(np.float32(value).view(np.uint32)) >> 16
    both = [(bits, float(np.uint32(bits << 16).view(np.float32))) for bits in (low, low + 1)]
    if math.isinf(both[0][1]):
        return low
    if math.isinf(both[1][1]):
        both[1] = (both[1][0], math.copysign(2.0**128, both[1][1]))
    return min(both, key=lambda one: (abs(one[1] - value), one[0] & 1))[0]


def test_bf16() -> None:
    a, b = floats("f4", 0), floats("f4", 1)
    bits = [nearest_bf16(float(one)) for one in a]
    assert each_thread("cvt.rn.bf16.f32 {d}, {a};", [a], "u2").tolist() == bits
    packed = each_thread("cvt.rn.bf16x2.f32 {d}, {a}, {b};", [a, b], "u4")
    assert packed.tolist() == [high << 16 | nearest_bf16(float(low)) for high, low in zip(bits, b, strict=True)]
    back = each_thread("cvt.f32.bf16 {d}, {a};", [np.array(bits, np.uint16)], "u4")
    assert back.tolist() == [one << 16 for one in bits]


def test_e4m3_in_pairs() -> None:
    a, b = (np.concatenate([floats("f4", seed), floats("f4", seed).clip(-500, 500) / 7]) for seed in (0, 1))
    packed = each_thread("cvt.rn.satfinite.e4m3x2.f32 {d}, {a}, {b};", [a, b], "u2")
    of_torch = [
        torch.from_numpy(one.clip(-448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy() for one in (b, a)
    ]
    np.testing.assert_array_equal(packed.view(np.uint8).reshape(-1, 2), np.stack(of_torch, 1))


def test_f16_in_pairs() -> None:
    a, b = floats("f4", 0), floats("f4", 1)
    packed = each_thread("cvt.rn.f16x2.f32 {d}, {a}, {b};", [a, b], "u4").view(np.float16).reshape(-1, 2)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(packed, np.stack([b, a], 1).astype(np.float16))


def test_floats_to_integers_stay_within_their_limits() -> None:
    a = floats("f4", 0)
    found = each_thread("cvt.rzi.s32.f32 {d}, {a};", [a], "i4")
    limits = np.iinfo(np.int32)
    wanted = [0 if math.isnan(one) else int(max(min(one, limits.max), limits.min)) for one in map(float, a)]
    assert found.tolist() == wanted


def test_tf32_has_ten_bits_of_a_fraction() -> None:
    a = np.where(np.isfinite(floats("f4", 0)), floats("f4", 0), np.float32(1)).clip(-1e30, 1e30)
    found = each_thread("cvt.rna.tf32.f32 {d}, {a};", [a], "f4").astype(np.float64)
    assert not (found.astype(np.float32).view(np.uint32) & 0x1FFF).any()
    normal = np.abs(a) > 1e-30
    assert (np.abs(found - a)[normal] <= 2.0**-11 * np.abs(a)[normal]).all()


COMPARISONS: list[tuple[str, str, Oracle]] = [
    ("lt.s32", "i4", lambda a, b: a < b),
    ("gt.u32", "u4", lambda a, b: a > b),
    ("ge.s64", "i8", lambda a, b: a >= b),
    ("eq.b16", "u2", lambda a, b: a == b),
    ("ne.b32", "u4", lambda a, b: a != b),
    ("lt.f32", "f4", lambda a, b: a < b),
    ("ne.f32", "f4", lambda a, b: a < b or a > b),
    ("neu.f32", "f4", lambda a, b: a != b),
    ("geu.f32", "f4", lambda a, b: not a < b),
]


@pytest.mark.parametrize(("name", "given", "oracle"), COMPARISONS, ids=[case[0] for case in COMPARISONS])
def test_comparisons(name: str, given: str, oracle: Oracle) -> None:
    a, b = ((floats if given[0] == "f" else integers)(given, seed) for seed in (0, 1))
    found = each_thread(f"setp.{name} {{d}}, {{a}}, {{b}};", [a, b], "bool")
    assert found.tolist() == [bool(oracle(x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def test_predicates() -> None:
    a, b = integers("i4", 0), integers("i4", 1)
    body = """
        setp.lt.s32 %p1, {a}, 5;
        setp.gt.or.s32 %p2, {b}, 7, %p1;
        not.pred %p3, %p1;
        and.pred %p4, %p2, %p3;
        mov.b32 {d}, 10;
        @%p4 mov.b32 {d}, 20;
        @!%p2 add.s32 {d}, {d}, 1;
        selp.b32 %r9, {d}, -1, %p1;
        @%p1 mov.b32 {d}, %r9;
    """
    found = each_thread(body, [a, b], "i4")
    assert found.tolist() == [10 if x < 5 else 20 if y > 7 else 11 for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def test_packing() -> None:
    a, b = integers("u4", 0), integers("u4", 1)
    body = """
        mov.b64 %rd1, {{{a}, {b}}};
        mov.b64 {{_, %r8}}, %rd1;
        mov.b32 {{%rs1, %rs2}}, %r8;
        mov.b32 {d}, {{%rs2, %rs1}};
    """
    assert each_thread(body, [a, b], "u4").tolist() == [(int(x) >> 16 | int(x) << 16) & 0xFFFFFFFF for x in b]


@pytest.mark.parametrize(
    ("operands", "source"),
    [
        ("bfly.b32 {d}, {a}, 5, 31, -1", lambda lane: lane ^ 5),
        ("idx.b32 {d}, {a}, 3, 31, -1", lambda lane: 3),
        ("up.b32 {d}, {a}, 2, 0, -1", lambda lane: lane - 2 if lane >= 2 else lane),
        ("down.b32 {d}, {a}, 7, 31, -1", lambda lane: lane + 7 if lane + 7 < 32 else lane),
    ],
    ids=["bfly", "idx", "up", "down"],
)
def test_shuffles(operands: str, source: Callable[[int], int]) -> None:
    a = integers("u4", 0)
    found = each_thread(f"shfl.sync.{operands};", [a], "u4")
    assert found.tolist() == [int(a[thread - thread % 32 + source(thread % 32)]) for thread in range(THREADS)]


@pytest.mark.parametrize("kind", ["min", "max", "add"])
def test_reductions_of_warps(kind: str) -> None:
    a = integers("i4", 0) % 1000
    found = each_thread(f"redux.sync.{kind}.s32 {{d}}, {{a}}, -1;", [a], "i4")
    functions: dict[str, Callable[[list[int]], int]] = {"min": min, "max": max, "add": sum}
    whole = functions[kind]
    assert found.tolist() == [whole(a[thread - thread % 32 :][:32].tolist()) for thread in range(THREADS)]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("bits", "count"), [(8, 1), (16, 1), (32, 1), (64, 1), (16, 2), (32, 2), (32, 4), (64, 2)])
def test_loads_and_stores(bits: int, count: int, space: str) -> None:
    """From one array to another, in between through shared memory, each thread some elements."""
    size = bits // 8 * count
    prefix = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
    registers = ", ".join(f"{prefix}{index + 1}" for index in range(count))
    registers = f"{{{registers}}}" if count > 1 else registers
    kind = f"v{count}.b{bits}" if count > 1 else f"b{bits}"
    between = f"""
        mov.b32 %r20, global_smem;
        mad.lo.s32 %r21, %r90, {size}, %r20;
        st.shared.{kind} [%r21+64], {registers};
        bar.sync 0;
        ld.shared.{kind} {registers}, [%r21+64];
    """
    body = f"""
        mad.lo.s64 %rd20, %rd80, {size}, %rd90;
        mad.lo.s64 %rd21, %rd80, {size}, %rd91;
        ld.global.{kind} {registers}, [ %rd20 + 0 ];
        {between if space == "shared" else ""}
        st.global.{kind} [%rd21], {registers};
    """
    source = np.random.default_rng(0).integers(0, 256, 32 * size, dtype=np.uint8)
    found = np.zeros_like(source)
    assert not run(kernel(body, 2), source, found)
    assert (found == source).all()


def test_signed_bytes_are_extended() -> None:
    source, found = np.arange(-16, 16, dtype=np.int8), np.zeros(32, np.int16)
    body = """
        add.s64 %rd1, %rd90, %rd80;
        ld.global.s8 %rs1, [%rd1];
        mad.lo.s64 %rd2, %rd80, 2, %rd91;
        st.global.b16 [%rd2], %rs1;
    """
    run(kernel(body, 2), source, found)
    assert found.tolist() == source.tolist()


def test_special_registers() -> None:
    found = np.zeros((3, 2, 64), np.uint32)
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ntid.x;
        mad.lo.s32 %r5, %r2, %r3, %r1;
        mad.lo.s32 %r6, %r5, %r4, %r90;
        mul.wide.u32 %rd1, %r6, 4;
        add.s64 %rd2, %rd90, %rd1;
        st.global.b32 [%rd2], %r6;
    """
    assert not run(kernel(body, threads=64), found, grid=(2, 3, 1))
    assert found.ravel().tolist() == list(range(3 * 2 * 64))


def test_addresses_outside_of_the_tensors() -> None:
    body = "mad.lo.s64 %rd1, %rd80, 4, %rd90; ld.global.b32 %r1, [%rd1+4];"
    with pytest.raises(Fault, match="outside of all tensors: 128 bytes from the start of array 0, which has 128"):
        run(kernel(body), np.zeros(32, np.float32))
    with pytest.raises(Fault, match="no multiple"):
        run(kernel(body.replace("+4", "+2")), np.zeros(64, np.float32))
    with pytest.raises(Fault, match="shared store at 0 to 4096, of 4096 bytes"):
        run(kernel("mul.lo.s32 %r1, %r90, 4096; setp.lt.u32 %p1, %r90, 2; @%p1 st.shared.b32 [%r1], %r1;"), np.zeros(1))


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("tcgen05.alloc.cta_group::1.sync.aligned.b32 [%r1], 32", "tensor memory of sm_100"),
        ("mbarrier.arrive.shared::cluster.b64 _, [%r1]", "shared::cluster"),
        ("mbarrier.arrive.shared.b64 %rd1, [%r1]", "the state of an mbarrier"),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 16, [%r4]",
            "TMA of",
        ),
        ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd1, {%r2, %r3}], [%r4]", "TMA"),
        ("tensormap.replace.tile.rank.shared::cta.b1024.b32 [%rd1], 1", "TMA descriptors that a kernel makes"),
        ("setmaxnreg.dec.sync.aligned.u32 40", "warp specialization"),
        ("atom.global.add.f32 %r1, [%rd1], %r2", "atomics"),
        ("bar.sync 1, 64", "a barrier of some threads"),
        ("add.rn.bf16x2 %r1, %r2, %r3", "arithmetic of .bf16x2"),
        ("ld.local.b32 %r1, [%rd1]", "the memory .local"),
        ("call.uni (retval), printf, (a, b)", "function calls"),
        ("mov.u64 %rd1, %clock64", "%clock64"),
        ("cvt.rz.f16.f32 %rs1, %r1", r"cvt\.rz\.f16\.f32"),
    ],
)
def test_what_is_not_emulated_is_refused_by_name(statement: str, name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        run(kernel(f"{statement};"), np.zeros(1))


def test_a_parameter_of_other_bytes_is_refused() -> None:
    ptx = kernel("", maps=1).replace("[128]", "[64]")
    with pytest.raises(Unsupported, match="no TMA descriptor"):
        run(ptx, np.zeros(1), maps=[bytes(64)])
