"""Counts of small kernels, worked out by hand."""

from __future__ import annotations

import numpy as np
import torch

from hilora.kernels.emulator.counting import Bytes, Counts, count
from hilora.kernels.emulator.values import Array

from .snippets import kernel


def counted(body: str, *arrays: Array, threads: int, grid: int = 1) -> Counts:
    tensors = {f"array {index}": torch.from_numpy(array) for index, array in enumerate(arrays)}
    pointers = [array.ctypes.data for array in arrays]
    return count(kernel(body, len(arrays), threads), (grid, 1, 1), pointers, 4096, tensors)


def test_bytes_and_instructions() -> None:
    """Three CTAs of two warps read the same 256 bytes, and the second warps write the same 64."""
    source, target = np.zeros(64, np.int32), np.zeros(1024, np.int16)
    body = """
        mad.lo.s64 %rd1, %rd80, 4, %rd90;
        ld.global.b32 %r1, [%rd1];
        setp.lt.u32 %p1, %r90, 32;
        @%p1 bra $end;
        mad.lo.s64 %rd2, %rd80, 2, %rd91;
        st.global.b16 [%rd2+512], %rs1;
        bar.warp.sync -1;
    $end:
        mov.b32 %r2, 0;
    """
    found = counted(body, source, target, threads=64, grid=3)
    assert found.tensors == {"array 0": Bytes(3 * 256, 0, 256, 0), "array 1": Bytes(0, 3 * 64, 0, 64)}
    assert found.total() == Bytes(768, 192, 256, 64)
    assert found.flops == 0
    every, second = 3 * 2, 3  # warps
    assert found.instructions == {
        "global memory": every + second,
        "control": every + every,  # one of them is `ret`
        "waiting": second,
        "arithmetic": every * (2 + 2 + 3) + second,  # pointers, the thread's number, and three of these
    }


def test_a_sector_is_read_whole() -> None:
    source = np.zeros(64, np.int32)
    body = "mad.lo.s64 %rd1, %rd80, 64, %rd90; setp.lt.u32 %p1, %r90, 4; @%p1 ld.global.b32 %r1, [%rd1];"
    assert counted(body, source, threads=32).tensors["array 0"] == Bytes(4 * 4, 0, 4 * 32, 0)


def test_flops_in_a_loop() -> None:
    """Seven times, two warps take a product of 16 x 8 x 16, and every thread of them one of two numbers."""
    body = """
        mov.b32 %r10, 0;
    $loop:
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {%r1, %r2, %r3, %r4}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%r1, %r2, %r3, %r4};
        fma.rn.f32 %r5, %r6, %r7, %r5;
        add.s32 %r10, %r10, 1;
        setp.lt.u32 %p1, %r10, 7;
        @%p1 bra $loop;
    """
    found = counted(body, np.zeros(8), threads=64)
    assert found.flops == 7 * 2 * (2 * 16 * 8 * 16 + 32 * 2)
    assert found.instructions["tensor cores"] == 7 * 2


def test_products_of_warp_groups() -> None:
    body = """
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, %rd10, %rd10, 0, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
    """
    found = counted(body, np.zeros(8), threads=256)
    assert found.flops == 2 * (2 * 64 * 8 * 16)
    assert found.instructions["tensor cores"] == 8
    assert found.instructions["waiting"] == 2 * 8
