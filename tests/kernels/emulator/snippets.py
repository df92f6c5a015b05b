"""Small kernels in PTX for the emulator's own tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from hilora.kernels.emulator.launching import execute
from hilora.kernels.emulator.values import Array

REGISTERS = {2: "%rs", 4: "%r", 8: "%rd"}  # by bytes


def kernel(body: str, pointers: int = 1, threads: int = 32, maps: int = 0) -> str:
    """PTX with pointers as parameters, which `%rd90`, `%rd91`, ... have, and TMA descriptors, at `%rd70`, `%rd71`, ...

    `%r90` and `%rd80` have the thread.
    """
    every = [f".param .u64 .ptr .global .align 1 kernel_param_{index}" for index in range(pointers)]
    every += [f".param .align 64 .b8 kernel_param_{pointers + index}[128]" for index in range(maps)]
    parameters = ", ".join(every)
    loads = "\n".join(f"ld.param.b64 %rd{90 + index}, [kernel_param_{index}];" for index in range(pointers))
    loads += "".join(
        f"mov.b64 %rd{60 + index}, kernel_param_{pointers + index}; cvta.param.u64 %rd{70 + index}, %rd{60 + index};"
        for index in range(maps)
    )
    return f"""
        .version 8.4
        .target sm_90a
        .address_size 64
        .extern .shared .align 16 .b8 global_smem[];
        .visible .entry kernel({parameters})
        .reqntid {threads}
        {{
        .reg .pred %p<20>;
        .reg .b16 %rs<20>;
        .reg .b32 %r<200>;
        .reg .b64 %rd<100>;
        {loads}
        mov.u32 %r90, %tid.x;
        cvt.u64.u32 %rd80, %r90;
        {body}
        ret;
        }}
    """


def run(
    ptx: str, *arrays: Array, grid: Sequence[int] = (1, 1, 1), shared: int = 4096, maps: Sequence[bytes] = ()
) -> Counter[str]:  # fmt: skip
    """Emulate a launch with arrays for its pointers, which are written in place; what races there were."""
    tensors = {f"array {index}": torch.from_numpy(array) for index, array in enumerate(arrays)}
    pointers = [array.ctypes.data for array in arrays]
    return execute(ptx, grid, [*pointers, *maps], shared, tensors)


def each_thread(instruction: str, inputs: Sequence[Array], result: str) -> Array:
    """An instruction on one element a thread, `d` its result and `a`, `b`, `c` its operands, in registers.

    Args:
        instruction: such as `add.s32 {d}, {a}, {b};`.
        inputs: of each operand, one element a thread; their number is a multiple of 32.
        result: numpy's name of the result's type, which may be `bool`.
    """
    names = {}
    lines = []
    for index, array in enumerate(inputs):
        size = array.dtype.itemsize
        names["abc"[index]] = register = f"{REGISTERS[size]}{index + 1}"
        lines.append(f"mad.lo.s64 %rd{20 + index}, %rd80, {size}, %rd{90 + index};")
        lines.append(f"ld.global.b{8 * size} {register}, [%rd{20 + index}];")
    dtype = np.dtype(result)
    size = 4 if result == "bool" else dtype.itemsize
    names["d"] = "%p0" if result == "bool" else f"{REGISTERS[size]}0"
    lines.append(instruction.format(**names))
    if result == "bool":
        lines.append("selp.b32 %r0, 1, 0, %p0;")
    lines.append(f"mad.lo.s64 %rd30, %rd80, {size}, %rd{90 + len(inputs)};")
    lines.append(f"st.global.b{8 * size} [%rd30], {REGISTERS[size]}0;")
    found = np.zeros(len(inputs[0]), "u4" if result == "bool" else dtype)
    races = run(kernel("\n".join(lines), len(inputs) + 1, len(found)), *inputs, found)
    assert not races
    return found.astype(bool) if result == "bool" else found
