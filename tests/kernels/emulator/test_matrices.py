"""Instructions of whole warps, with the layouts that the PTX manual gives, against matrix products."""

from __future__ import annotations

import numpy as np
import pytest

from hilora.kernels.emulator.values import SIZES, Array, bf16_bits, bf16_value, e4m3_bits, element

from .snippets import kernel, run

TOLERANCE = 1e-5


def matrix(rows: int, columns: int, kind: str, seed: int) -> tuple[Array, Array]:
    """Bits of a random matrix, and its values."""
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    bits = {"bf16": bf16_bits, "f16": lambda v: v.astype(np.float16).view(np.uint16), "tf32": lambda v: v.view("u4")}
    found: Array = (bits | {"e4m3": e4m3_bits})[kind](values)
    return found, element(found, kind).astype(np.float64)


def names(first: int, count: int) -> str:
    return ", ".join(f"%r{first + index}" for index in range(count))


def loads(pointer: int, first: int, count: int) -> str:
    """Registers of each thread from an array `[threads, count]`."""
    lines = [f"mad.lo.s64 %rd20, %rd80, {4 * count}, %rd{90 + pointer};"]
    return "\n".join(lines + [f"ld.global.b32 %r{first + index}, [%rd20+{4 * index}];" for index in range(count)])


def stores(pointer: int, first: int, count: int) -> str:
    lines = [f"mad.lo.s64 %rd20, %rd80, {4 * count}, %rd{90 + pointer};"]
    return "\n".join(lines + [f"st.global.b32 [%rd20+{4 * index}], %r{first + index};" for index in range(count)])


def fragments(places: list[list[list[tuple[int, int]]]], bits: Array) -> Array:
    """Registers `[threads, registers]` of elements of a matrix: of each thread and register, its row and column."""
    together = len(places[0][0])
    taken = [[[bits[place] for place in register] for register in thread] for thread in places]
    return np.array(taken, bits.dtype).reshape(len(places), -1, together).view(np.uint32)[:, :, 0].copy()


@pytest.mark.parametrize(
    ("kind", "depth"), [("bf16", 16), ("f16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4)] + [("e4m3", 32), ("e4m3", 16)]
)
def test_products_of_a_warp(kind: str, depth: int) -> None:
    a, left = matrix(16, depth, kind, 0)
    b, right = matrix(depth, 8, kind, 1)
    together = 4 // SIZES[kind]
    lanes = [(lane // 4, lane % 4) for lane in range(32)]
    halves = depth // (4 * together)
    of_a = [
        [
            [(group + 8 * low, together * (t + 4 * half) + i) for i in range(together)]
            for half in range(halves)
            for low in (0, 1)
        ]
        for group, t in lanes
    ]
    of_b = [
        [[(together * (t + 4 * half) + i, group) for i in range(together)] for half in range(halves)]
        for group, t in lanes
    ]
    of_c = [[(group + 8 * (i // 2), 2 * t + i % 2) for i in range(4)] for group, t in lanes]
    c = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)
    given = [fragments(of_a, a), fragments(of_b, b), np.array([[c[place] for place in thread] for thread in of_c])]
    found = np.zeros((32, 4), np.float32)
    count = [one.shape[1] for one in given]
    body = f"""
        {loads(0, 1, count[0])}
        {loads(1, 11, count[1])}
        {loads(2, 21, 4)}
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32
            {{ {names(31, 4)} }}, {{ {names(1, count[0])} }}, {{ {names(11, count[1])} }}, {{ {names(21, 4)} }};
        {stores(3, 31, 4)}
    """
    assert not run(kernel(body, 4), *given, found)
    wanted = left @ right + c
    np.testing.assert_allclose(found, [[wanted[place] for place in thread] for thread in of_c], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_from_shared_memory_and_back(count: int, transposed: bool) -> None:
    source = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    found, copy = np.zeros((32, count, 2), np.uint16), np.zeros_like(source)
    turn = ".trans" if transposed else ""
    registers = f"{{ {names(1, count)} }}"
    body = f"""
        setp.lt.u32 %p1, %r90, {8 * count};
        mad.lo.s64 %rd1, %rd80, 16, %rd90;
        shl.b32 %r20, %r90, 4;
        @%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd1];
        @%p1 st.shared::cta.v4.b32 [%r20], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{turn}.shared.b16 {registers}, [%r20];
        {stores(1, 1, count)}
        stmatrix.sync.aligned.m8n8.x{count}{turn}.shared::cta.b16 [%r20+1024], {registers};
        bar.sync 0;
        @%p1 ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r20+1024];
        mad.lo.s64 %rd1, %rd80, 16, %rd92;
        @%p1 st.global.v4.b32 [%rd1], {{%r10, %r11, %r12, %r13}};
    """
    assert not run(kernel(body, 3), source, found, copy)
    for lane in range(32):
        for index in range(count):
            pair = [(lane // 4, lane % 4 * 2 + i) for i in (0, 1)]
            assert found[lane, index].tolist() == [
                source[index][place[::-1] if transposed else place] for place in pair
            ]
    assert (copy == source).all()


def swizzled(bits: Array) -> Array:
    """`[rows, columns]` in blocks of 128 bytes: row i of a block has its 16-byte pieces at places `piece ^ i % 8`."""
    across = 128 // bits.itemsize
    blocks = []
    for first in range(0, bits.shape[1], across):
        pieces = bits[:, first : first + across].reshape(len(bits), 8, -1)
        blocks.append(np.stack([pieces[row, [piece ^ row % 8 for piece in range(8)]] for row in range(len(bits))]))
    return np.stack(blocks).ravel()


SHARED = 48 * 1024
SWIZZLE = 1 << 62


def descriptor(start: int, leading: int, stride: int) -> int:
    return SWIZZLE | (stride >> 4) << 32 | (leading >> 4) << 16 | start >> 4


def of_accumulator(columns: int) -> list[list[tuple[int, int]]]:
    """Rows and columns of the results that each thread has."""
    return [
        [
            (16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (thread % 4) + i % 2)
            for i in range(columns // 2)
        ]
        for thread in range(128)
    ]


def products(kind: str, columns: int, steps: list[str], size: int) -> str:
    """A kernel that copies both operands' images to shared memory, multiplies, and stores the accumulators."""
    return f"""
        mov.b32 %r10, 0;
    $copy:
        mad.lo.s32 %r11, %r10, 128, %r90;
        mul.wide.u32 %rd1, %r11, 16;
        add.s64 %rd2, %rd90, %rd1;
        shl.b32 %r12, %r11, 4;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd2];
        st.shared::cta.v4.b32 [%r12], {{%r1, %r2, %r3, %r4}};
        add.s32 %r10, %r10, 1;
        setp.lt.u32 %p1, %r10, {size // 2048};
        @%p1 bra $copy;
        {loads(2, 100, 4 * len(steps)) if "%r100" in steps[0] else ""}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        {"".join(steps)}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        {stores(1, 20, columns // 2)}
    """


@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize(
    ("kind", "columns", "turned"),
    [("bf16", 64, False), ("bf16", 64, True), ("bf16", 128, True), ("f16", 32, False), ("f16", 128, False)]
    + [("tf32", 64, False), ("e4m3", 64, False)],
)
def test_products_of_a_warp_group(kind: str, columns: int, turned: bool, in_registers: bool) -> None:
    """`A [64, K] B [columns, K]ᵀ` in steps of K, operands swizzled in shared memory, along K or across it."""
    size = SIZES[kind]
    depth = 128 // size
    a, left = matrix(64, depth, kind, 0)
    b, right = matrix(columns, depth, kind, 1)
    along = depth // 4  # K of a step: 32 bytes
    image_a = swizzled(np.ascontiguousarray(a.T) if turned else a).view(np.uint8)
    image_b = swizzled(np.ascontiguousarray(b.T) if turned else b).view(np.uint8)
    image = np.concatenate([image_a, image_b])
    steps = []
    for step in range(4):
        if turned:
            here = [descriptor(start + step * along * 128, depth * 128, 1024) for start in (0, len(image_a))]
        else:
            here = [descriptor(start + step * 32, 16, 1024) for start in (0, len(image_a))]
        operand = f"{{ {names(100 + 4 * step, 4)} }}" if in_registers else "%rd10"
        turns = "" if SIZES[kind] != 2 else f", {int(turned)}" if in_registers else f", {int(turned)}, {int(turned)}"
        steps.append(
            f"""
            mov.b64 %rd10, {here[0]};
            mov.b64 %rd11, {here[1]};
            wgmma.mma_async.sync.aligned.m64n{columns}k{along}.f32.{kind}.{kind}
                {{ {names(20, columns // 2)} }}, {operand}, %rd11, {int(step > 0)}, 1, 1{turns};
            """
        )
    together = 4 // size
    of_a = [
        [
            [
                (
                    16 * (thread // 32) + thread % 32 // 4 + 8 * (i % 2),
                    along * step + together * (thread % 4 + 4 * (i // 2)) + j,
                )
                for j in range(together)
            ]
            for step in range(4)
            for i in range(4)
        ]
        for thread in range(128)
    ]
    found = np.zeros((128, columns // 2), np.float32)
    body = products(kind, columns, steps, len(image))
    assert not run(kernel(body, 3, threads=128), image, found, fragments(of_a, a), shared=SHARED)
    wanted = left @ right.T
    places = of_accumulator(columns)
    np.testing.assert_allclose(found, [[wanted[place] for place in thread] for thread in places], rtol=0, atol=1e-4)


def test_values_of_bf16() -> None:
    assert bf16_value(np.array([0x3F80, 0xC000], np.uint16)).tolist() == [1, -2]
