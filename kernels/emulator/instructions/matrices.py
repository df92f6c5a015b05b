"""Products by the tensor cores of a warp, `mma.sync`: 16 x 8 results."""

from __future__ import annotations

import re

import numpy as np

from ..code import Operands, instruction
from ..errors import Unsupported
from ..machine import LANES, Action, Machine
from ..values import SIZES, Array, element

_ROW, _IN_ROW = np.arange(LANES) // 4, np.arange(LANES) % 4


@instruction("mma.sync")
def multiply(operands: Operands) -> Action:
    """A is 16 x K, B is K x 8, both in tf32 or numbers of 16 or 8 bits, C in fp32."""
    shape = re.search(r"\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32|e4m3)\.\2\.f32$", operands.one.opcode)
    depth = int(shape[1]) if shape else 0
    kind = shape[2] if shape else ""
    together = 4 // SIZES.get(kind, 4)  # numbers in a register
    if depth not in (4 * together, 8 * together) or operands.one.guard:
        raise Unsupported(str(operands.one))
    bits = np.dtype("u4")
    puts = [operands.write(text) for text in operands.vector(0)]
    left = [operands.read(text, bits) for text in operands.vector(1)]
    right = [operands.read(text, bits) for text in operands.vector(2)]
    addend = [operands.read(text, np.dtype("f4")) for text in operands.vector(3)]

    def numbers(value: Array, machine: Machine) -> Array:
        """`[warps, lanes, together]`"""
        whole = np.ascontiguousarray(np.broadcast_to(value, machine.size))
        parts = whole.view(f"u{4 // together}")
        return element(parts, kind).reshape(-1, LANES, together)

    def act(machine: Machine) -> None:
        machine.whole_warps()
        if machine.races is None:
            return
        warps = machine.size // LANES
        a, b = np.empty((warps, 16, depth), np.float32), np.empty((warps, depth, 8), np.float32)
        for index, read in enumerate(left):
            values = numbers(read(machine), machine)
            for part in range(together):
                column = together * (_IN_ROW + 4 * (index // 2)) + part
                a[:, _ROW + 8 * (index % 2), column] = values[:, :, part]
        for index, read in enumerate(right):
            values = numbers(read(machine), machine)
            for part in range(together):
                b[:, together * (_IN_ROW + 4 * index) + part, _ROW] = values[:, :, part]
        product = a @ b
        for index, (read, put) in enumerate(zip(addend, puts, strict=True)):
            found = product[:, _ROW + 8 * (index // 2), 2 * _IN_ROW + index % 2]
            put(machine, (read(machine) + found.ravel()).astype(np.float32))

    return act
