"""Moving, packing, choosing, converting and shuffling values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..code import Operands, instruction
from ..errors import Unsupported
from ..machine import LANES, Action, Machine
from ..values import Array, bf16_bits, bf16_value, dtype_of, e4m3_bits, tf32_bits, unsigned

_ROUNDINGS: dict[str, Callable[[Array], Array]] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@instruction("mov")
def move(operands: Operands) -> Action:
    operands.only(())
    if operands.texts[0].startswith("{"):
        return _unpack(operands)
    if operands.texts[1].startswith("{"):
        return _pack(operands)
    source, put = operands.source(1, unsigned(operands.code.program.bits(operands.texts[0]))), operands.target()
    return lambda machine: put(machine, source(machine))


def _unpack(operands: Operands) -> Action:
    parts = operands.vector(0)
    whole = operands.type
    part = np.dtype(f"u{whole.itemsize // len(parts)}")
    source, puts = operands.source(1), [operands.write(text) for text in parts]

    def act(machine: Machine) -> None:
        value = np.broadcast_to(source(machine), machine.size)
        pieces = np.ascontiguousarray(value).view(part).reshape(machine.size, len(parts))
        for piece, put in zip(np.ascontiguousarray(pieces.T), puts, strict=True):
            put(machine, piece)

    return act


def _pack(operands: Operands) -> Action:
    parts = operands.vector(1)
    whole = operands.type
    sources = [operands.read(text, np.dtype(f"u{whole.itemsize // len(parts)}")) for text in parts]
    put = operands.target()

    def act(machine: Machine) -> None:
        pieces = [np.broadcast_to(source(machine), machine.size) for source in sources]
        put(machine, np.stack(pieces, 1).view(whole)[:, 0])

    return act


@instruction("cvta")
def generic_address(operands: Operands) -> Action:
    if not {"global", "param"} & set(operands.parts):
        raise Unsupported(f"generic addresses: {operands.one}")
    source, put = operands.source(1), operands.target()
    return lambda machine: put(machine, source(machine))


@instruction("selp")
def select(operands: Operands) -> Action:
    a, b, put = operands.source(1), operands.source(2), operands.target()
    condition = operands.source(3, np.dtype(bool))
    return lambda machine: put(machine, np.where(condition(machine), a(machine), b(machine)))


@instruction("prmt")
def permute_bytes(operands: Operands) -> Action:
    operands.only(())
    a, b, selector, put = operands.source(1), operands.source(2), operands.source(3), operands.target()

    def act(machine: Machine) -> None:
        both = a(machine).astype(np.uint64) | (b(machine).astype(np.uint64) << np.uint64(32))
        choice, found = selector(machine), np.zeros(machine.size, np.uint32)
        for index in range(4):
            nibble = (choice >> np.uint32(4 * index)) & np.uint32(15)
            byte = ((both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype("u4")
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            found |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * index)
        put(machine, found)

    return act


@instruction("cvt")
def convert(operands: Operands) -> Action:
    *modifiers, to, given = operands.parts[1:]
    put = operands.target()
    if to in ("bf16x2", "f16x2", "e4m3x2"):
        return _convert_two(operands, to, modifiers)
    read = operands.source(1, dtype_of(given))
    function = _conversion(to, given, modifiers)
    if function is None:
        raise Unsupported(str(operands.one))
    return lambda machine: put(machine, function(read(machine)))


def _conversion(to: str, given: str, modifiers: list[str]) -> Callable[[Array], Array] | None:
    """From an array of type `given` to one of type `to`; None where it is unknown."""
    narrow = {"bf16": bf16_bits, "tf32": tf32_bits}
    if to in narrow:
        known = given == "f32" and modifiers == [{"bf16": "rn", "tf32": "rna"}[to]]
        return narrow[to] if known else None
    if given == "bf16":
        return bf16_value if to == "f32" and not modifiers else None
    source, target = dtype_of(given), dtype_of(to)
    if target.kind == "f":
        return (lambda value: value.astype(target)) if modifiers in ([], ["rn"]) else None
    if source.kind == "f":
        return _to_integer(target, modifiers)
    return (lambda value: value.astype(target)) if not modifiers else None


def _to_integer(target: np.dtype[np.generic], modifiers: list[str]) -> Callable[[Array], Array] | None:
    """From floats, to the limits of the type where they lie beyond; zero for NaN."""
    rounding = _ROUNDINGS.get(modifiers[0]) if modifiers else None
    if rounding is None or modifiers[1:] not in ([], ["sat"]) or target.itemsize > 4:
        return None
    limits = np.iinfo(target)  # type: ignore[type-var]
    return lambda value: np.clip(np.nan_to_num(rounding(value.astype(np.float64))), limits.min, limits.max).astype(
        target
    )


def _convert_two(operands: Operands, to: str, modifiers: list[str]) -> Action:
    if modifiers != (["rn", "satfinite"] if to == "e4m3x2" else ["rn"]) or operands.parts[-1] != "f32":
        raise Unsupported(str(operands.one))
    high, low, put = operands.source(1), operands.source(2), operands.target()
    if to == "e4m3x2":
        return lambda machine: put(machine, e4m3_bits(high(machine)).astype(np.uint16) << 8 | e4m3_bits(low(machine)))

    def bits(value: Array) -> Array:
        narrow = bf16_bits(value) if to == "bf16x2" else value.astype(np.float16).view(np.uint16)
        return narrow.astype(np.uint32)

    return lambda machine: put(machine, (bits(high(machine)) << np.uint32(16)) | bits(low(machine)))


@instruction("shfl")
def shuffle(operands: Operands) -> Action:
    """Within whole warps; no sub-warps, and no predicate of who was in range."""
    kind = operands.parts[2]
    clamp = {"bfly": 31, "idx": 31, "down": 31, "up": 0}[kind]
    if "|" in operands.texts[0] or int(operands.texts[3], 0) != clamp:
        raise Unsupported(str(operands.one))
    value, by, put = operands.source(1), operands.source(2, np.dtype("i4")), operands.target()

    def act(machine: Machine) -> None:
        machine.whole_warps()
        lane = machine.lane.astype(np.int32)
        step = by(machine)
        places = {"bfly": lane ^ step, "idx": step % LANES + 0 * lane, "down": lane + step, "up": lane - step}[kind]
        places = np.where((places < 0) | (places >= LANES), lane, places)
        rows = np.broadcast_to(value(machine), machine.size).reshape(-1, LANES)
        put(machine, np.take_along_axis(rows, places.reshape(-1, LANES), 1).ravel())

    return act


@instruction("redux")
def reduce(operands: Operands) -> Action:
    """Over whole warps."""
    functions: dict[str, Any] = {"min": np.min, "max": np.max, "add": np.sum}
    if operands.parts[2] not in functions:
        raise Unsupported(str(operands.one))
    value, put = operands.source(1), operands.target()

    def act(machine: Machine) -> None:
        machine.whole_warps()
        rows = np.broadcast_to(value(machine), machine.size).reshape(-1, LANES)
        reduced = functions[operands.parts[2]](rows, 1, keepdims=True).astype(rows.dtype)
        put(machine, np.broadcast_to(reduced, rows.shape).ravel())

    return act
