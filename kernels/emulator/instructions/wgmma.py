"""Products by the tensor cores of a warp group, `wgmma`, with operands in shared memory: 64 x N results."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from ..code import Operands, Read, instruction
from ..errors import Fault, Unsupported
from ..machine import LANES, WARPGROUP, Action, Machine
from ..tensormaps import CHUNK
from ..values import SIZES, Array, element

_SWIZZLES = {1: 128, 2: 64, 3: 32}  # bytes of a row, by the code in a descriptor
_THREAD = np.arange(WARPGROUP)
_ROW, _IN_ROW = 16 * (_THREAD // LANES) + _THREAD % LANES // 4, _THREAD % 4


@instruction("wgmma.fence")
def fence(operands: Operands) -> Action:
    return lambda machine: None


@instruction("wgmma.commit_group")
def commit(operands: Operands) -> Action:
    return lambda machine: machine.products.commit(machine.agents(machine.whole_ctas()))


@instruction("wgmma.wait_group")
def wait(operands: Operands) -> Action:
    pending = int(operands.texts[0])
    return lambda machine: machine.wait_for_products(pending)


@lru_cache(1 << 14)
def _chunks(descriptor: int, rows: int, depth: int, transposed: bool, size: int) -> Array:
    """Addresses in shared memory of the chunks of a matrix `[rows, depth]`, whose elements have `size` bytes.

    Rows of a swizzle's width lie side by side, eight of them in a group. A chunk is a part of a matrix' row, whose
    chunks are `[rows, chunks]`; where it is "transposed", of a column: `[chunks, depth]`.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 62 not in _SWIZZLES or descriptor >> 49 & 7:
        raise Unsupported(f"the matrix descriptor {descriptor:#x}")
    width, together = _SWIZZLES[descriptor >> 62], CHUNK // size
    if transposed:
        along = width // size
        i, k = np.arange(0, rows, together)[:, None], np.arange(depth)[None, :]
        place = start + i // along * leading + k // 8 * stride + k % 8 * width + i % along * size
    else:
        i, k = np.arange(rows)[:, None], np.arange(0, depth, together)[None, :]
        place = start + i // 8 * stride + i % 8 * width + k * size
    return place ^ (((place >> 7) & (width // CHUNK - 1)) << 4)


@instruction("wgmma.mma_async")
def multiply(operands: Operands) -> Action:
    """`D = A Bᵀ (+ D)`, A 64 x K from registers or shared memory, B N x K from shared memory."""
    shape = re.search(r"\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32|e4m3)\.\3$", operands.one.opcode)
    if shape is None or operands.one.guard:
        raise Unsupported(str(operands.one))
    columns, depth, kind = int(shape[1]), int(shape[2]), shape[3]
    registers = [operands.register(text)[0] for text in operands.vector(0)]
    in_registers = operands.texts[1].startswith("{")
    parts = [operands.read(text, np.dtype("u4")) for text in operands.vector(1)] if in_registers else []
    place = None if in_registers else operands.source(1, np.dtype("u8"))
    right, keep = operands.source(2, np.dtype("u8")), operands.source(3, np.dtype(bool))
    signs, transposed = operands.texts[4:6], [int(text) for text in operands.texts[6:]]
    if signs != ("1", "1"):
        raise Unsupported(f"negated operands: {operands.one}")
    turn_left, turn_right = (0, 0, *transposed)[-2:] if len(transposed) != 1 else (0, transposed[0])
    size = SIZES[kind]
    of_thread = np.arange(columns // 2)[:, None]
    row, column = _ROW + 8 * (of_thread // 2 % 2), 8 * (of_thread // 4) + 2 * _IN_ROW + of_thread % 2

    def operand(read: Read, group: int, ctas: Array, rows: int, turned: int, machine: Machine) -> Array:
        descriptors = _of_group(read(machine), group, machine)[ctas]
        if (descriptors != descriptors[:, :1]).any():
            raise Fault(f"a matrix descriptor that differs between threads: {machine.now}")
        chunks = np.stack([_chunks(int(one), rows, depth, bool(turned), size) for one in descriptors[:, 0]])
        first = ctas * machine.code.program.threads + group * WARPGROUP
        found = machine.shared.operands(chunks, CHUNK, machine.who(first), group, machine.report).view(f"u{size}")
        return element((found.swapaxes(2, 3) if turned else found).reshape(len(ctas), rows, depth), kind)

    def fragments(group: int, ctas: Array, machine: Machine) -> Array:
        found = np.empty((len(ctas), 64, depth), np.float32)
        together = 4 // size
        for index, read in enumerate(parts):
            bits = np.ascontiguousarray(_of_group(read(machine), group, machine)[ctas]).view(f"u{size}")
            values = element(bits, kind).reshape(len(ctas), WARPGROUP, together)
            for one in range(together):
                found[:, _ROW + 8 * (index % 2), together * (_IN_ROW + 4 * (index // 2)) + one] = values[:, :, one]
        return found

    def act(machine: Machine) -> None:
        ctas = machine.whole_ctas()
        if machine.code.program.threads % WARPGROUP:
            raise Fault(f"wgmma by {machine.code.program.threads} threads")
        if machine.races is None:
            return
        sums = np.stack([machine.registers[number] for number in registers])
        sums = sums.view(np.float32).reshape(len(registers), len(machine.intervals), machine.warpgroups, WARPGROUP)
        kept = np.broadcast_to(keep(machine), machine.size).reshape(sums.shape[1:])
        for group in range(machine.warpgroups):
            a = (
                fragments(group, ctas, machine)
                if place is None
                else operand(place, group, ctas, 64, turn_left, machine)
            )
            b = operand(right, group, ctas, columns, turn_right, machine)
            product = (a @ b.swapaxes(1, 2))[:, row, column].swapaxes(0, 1)
            sums[:, ctas, group] = np.where(kept[ctas, group], sums[:, ctas, group], np.float32(0)) + product
        for index, register in enumerate(registers):
            machine.registers[register] = sums[index].ravel().view(np.uint32)
        machine.note_accumulators(registers, machine.agents(ctas))

    return act


def _of_group(value: Array, group: int, machine: Machine) -> Array:
    """`[CTAs, threads of the group]`"""
    return np.broadcast_to(value, machine.size).reshape(-1, machine.warpgroups, WARPGROUP)[:, group]
