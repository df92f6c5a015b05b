"""Loads and stores, one thread's or a warp's matrices."""

from __future__ import annotations

import numpy as np

from ..code import Operands, instruction
from ..errors import Fault, Unsupported
from ..machine import LANES, Action, Machine
from ..values import Array, dtype_of, unsigned

_HINTS = ("nc", "relaxed", "weak", "volatile", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "cta", "gpu")


def _access(operands: Operands) -> tuple[str, int]:
    """The space of an access, and its elements a thread."""
    space = operands.parts[1].partition("::")[0]
    vectors = [int(part[1:]) for part in operands.parts if part in ("v2", "v4", "v8")]
    for part in operands.parts[2:-1]:
        if part not in ("v2", "v4", "v8", "shared::cta") and not part.startswith(_HINTS):
            raise Unsupported(f"the modifier .{part} of {operands.one}")
    if space not in ("global", "shared") or "shared::cluster" in operands.one.opcode:
        raise Unsupported(f"the memory .{operands.parts[1]} of {operands.one}")
    return space, vectors[0] if vectors else 1


def _threads(mask: Array | None, machine: Machine) -> Array:
    return np.arange(machine.size) if mask is None else np.flatnonzero(mask)


@instruction("ld")
def load(operands: Operands) -> Action:
    if operands.parts[1] == "param":
        return _parameter(operands)
    space, count = _access(operands)
    puts = [operands.write(text) for text in operands.vector(0)]
    address, guard, dtype = operands.address(1), operands.guard(), operands.type

    def act(machine: Machine) -> None:
        threads = _threads(guard(machine), machine)
        if not len(threads):
            return
        memory = machine.memory if space == "global" else machine.shared
        addresses = address(machine)[threads]
        found = memory.load(addresses, dtype.itemsize, count, machine.who(threads), machine.report)
        for column, put in zip(found.T, puts, strict=True):
            value = np.zeros(machine.size, found.dtype)
            value[threads] = column
            put(machine, value.view(dtype))

    return act


def _parameter(operands: Operands) -> Action:
    name = operands.texts[1].strip("[] ")
    names = list(operands.code.program.parameters)
    if name not in names:
        raise Unsupported(f"part of a parameter: {operands.one}")
    put, index, dtype = operands.target(), names.index(name), unsigned(8 * operands.type.itemsize)
    return lambda machine: put(machine, np.array([machine.arguments[index]], np.uint64).astype(dtype))


@instruction("st")
def store(operands: Operands) -> Action:
    space, _ = _access(operands)
    dtype = unsigned(8 * operands.type.itemsize)
    sources = [operands.read(text, dtype) for text in operands.vector(1)]
    address, guard = operands.address(0), operands.guard()

    def act(machine: Machine) -> None:
        threads = _threads(guard(machine), machine)
        if not len(threads):
            return
        values = np.stack([np.broadcast_to(source(machine), machine.size)[threads] for source in sources], 1)
        memory = machine.memory if space == "global" else machine.shared
        memory.store(address(machine)[threads], values, machine.who(threads), machine.report)

    return act


def _matrices(operands: Operands) -> tuple[int, bool]:
    """How many 8 x 8 matrices of 16-bit numbers, and whether they lie transposed."""
    transposed = "trans" in operands.parts
    operands.only(("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"))
    return next(int(part[1:]) for part in operands.parts if part in ("x1", "x2", "x4")), transposed


def _rows(addresses: Array, count: int, machine: Machine) -> tuple[Array, Array]:
    """Threads that give addresses of rows, 8 for each matrix, and the addresses `[8 count warps]`."""
    if machine.active is not None:
        machine.whole_warps()
    active = np.ones(machine.size, bool) if machine.active is None else machine.active
    threads = np.flatnonzero(active & (machine.lane < 8 * count))
    return threads, addresses[threads]


@instruction("ldmatrix")
def load_matrices(operands: Operands) -> Action:
    """Lane i gets elements 2i and 2i + 1 of each matrix; lanes 0-7, 8-15, ... have the addresses of its rows."""
    count, transposed = _matrices(operands)
    puts = [operands.write(text) for text in operands.vector(0)]
    address = operands.address(1)
    _no_guard(operands)

    def act(machine: Machine) -> None:
        threads, addresses = _rows(address(machine), count, machine)
        found = machine.shared.load(addresses, 2, 8, machine.who(threads), machine.report)
        matrices = found.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, LANES)
        for index, put in enumerate(puts):
            value = np.zeros(machine.size, np.uint32)
            value.reshape(-1, LANES)[threads.reshape(-1, count * 8)[:, 0] // LANES] = pairs[:, index]
            put(machine, value)

    return act


@instruction("stmatrix")
def store_matrices(operands: Operands) -> Action:
    count, transposed = _matrices(operands)
    sources = [operands.read(text, dtype_of("b32")) for text in operands.vector(1)]
    address = operands.address(0)
    _no_guard(operands)

    def act(machine: Machine) -> None:
        threads, addresses = _rows(address(machine), count, machine)
        warps = threads.reshape(-1, count * 8)[:, 0] // LANES
        pairs = np.stack([source(machine).reshape(-1, LANES)[warps] for source in sources], 1)
        matrices = pairs.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        machine.shared.store(addresses, matrices.reshape(-1, 8), machine.who(threads), machine.report)

    return act


def _no_guard(operands: Operands) -> None:
    if operands.one.guard:
        raise Unsupported(f"a guard of {operands.one}")


@instruction("atom", "red")
def atomic(operands: Operands) -> Action:
    raise Unsupported(f"atomics: {operands.one}")


@instruction("trap")
def trap(operands: Operands) -> Action:
    guard = operands.guard()

    def act(machine: Machine) -> None:
        threads = guard(machine)
        if threads is None or threads.any():
            raise Fault(f"{machine.code.program.name} traps at {machine.now.line}")

    return act
