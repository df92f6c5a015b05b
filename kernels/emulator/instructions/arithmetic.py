"""Integers and floats, element by element."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..code import Operands, instruction
from ..errors import Unsupported
from ..machine import Action, Machine
from ..values import Array

_FLOAT = {"rn", "full", "approx", "ftz"}


def _unary(function: Callable[[Array], Array], operands: Operands) -> Action:
    a, put = operands.source(1), operands.target()
    return lambda machine: put(machine, function(a(machine)))


def _binary(function: Callable[[Array, Array], Array], operands: Operands) -> Action:
    a, b, put = operands.source(1), operands.source(2), operands.target()
    return lambda machine: put(machine, function(a(machine), b(machine)))


def _no_packed(operands: Operands) -> None:
    if operands.parts[-1] in ("bf16", "bf16x2", "f16x2"):
        raise Unsupported(f"arithmetic of .{operands.parts[-1]}: {operands.one}")


@instruction("add", "sub", "and", "or", "xor", "min", "max")
def two(operands: Operands) -> Action:
    _no_packed(operands)
    operands.only(_FLOAT if operands.type.kind == "f" else ())
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "min": np.fmin, "max": np.fmax,
    }  # fmt: skip
    return _binary(functions[operands.parts[0]], operands)


@instruction("not", "neg", "abs")
def one(operands: Operands) -> Action:
    if operands.parts[0] == "abs" and operands.parts[-1] in ("bf16", "bf16x2", "f16x2"):
        return _unary(lambda a: a & a.dtype.type(0x7FFF7FFF & np.iinfo(a.dtype).max), operands)
    _no_packed(operands)
    operands.only(_FLOAT if operands.type.kind == "f" else ())
    functions: dict[str, Callable[[Array], Array]] = {"not": np.invert, "neg": np.negative, "abs": np.abs}
    return _unary(functions[operands.parts[0]], operands)


def _high(a: Array, b: Array) -> Array:
    """The upper half of a product: in Python's integers for 64 bits, for which numpy has no wider type."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        product = _wide(a, b)
        high: Array = product >> product.dtype.type(bits)
        return high.astype(a.dtype)
    exact: Array = a.astype(object) * b.astype(object) >> bits
    return exact.astype(a.dtype)


def _wide(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
    product: Array = a.astype(wide) * b.astype(wide)
    return product


@instruction("mul")
def multiply(operands: Operands) -> Action:
    _no_packed(operands)
    if operands.type.kind == "f":
        operands.only(_FLOAT)
        return _binary(np.multiply, operands)
    operands.only(("lo", "hi", "wide"))
    functions: dict[str, Callable[[Array, Array], Array]] = {"lo": np.multiply, "hi": _high, "wide": _wide}
    return _binary(functions[operands.parts[1]], operands)


@instruction("mad")
def multiply_and_add(operands: Operands) -> Action:
    operands.only(("lo", "wide"))
    dtype = operands.type
    wide = operands.parts[1] == "wide"
    result = np.dtype(f"{dtype.kind}{dtype.itemsize * 2}") if wide else dtype
    a, b, c, put = operands.source(1), operands.source(2), operands.source(3, result), operands.target()
    product: Callable[[Array, Array], Array] = _wide if wide else np.multiply
    return lambda machine: put(machine, product(a(machine), b(machine)) + c(machine))


@instruction("fma")
def fused(operands: Operands) -> Action:
    """The product is exact in fp64; its sum is rounded to fp64, then to fp32."""
    operands.only(_FLOAT)
    if operands.parts[-1] != "f32":
        raise Unsupported(f"fma of .{operands.parts[-1]}: {operands.one}")
    a, b, c, put = operands.source(1), operands.source(2), operands.source(3), operands.target()
    return lambda machine: put(machine, (a(machine).astype(np.float64) * b(machine) + c(machine)).astype(np.float32))


def _divided(a: Array, b: Array) -> Array:
    """Integers towards zero; all ones for a division by zero, as GPUs have it."""
    none = b == 0
    b = np.where(none, b.dtype.type(1), b)
    quotient = a // b
    if a.dtype.kind == "i":
        quotient = quotient + ((a - quotient * b != 0) & ((a < 0) != (b < 0)))
    return np.where(none, ~b.dtype.type(0), quotient).astype(a.dtype)


@instruction("div", "rem")
def divide(operands: Operands) -> Action:
    if operands.type.kind == "f":
        operands.only(_FLOAT)
        return _binary(np.divide, operands)
    operands.only(())
    if operands.parts[0] == "div":
        return _binary(_divided, operands)
    return _binary(lambda a, b: a - _divided(a, b) * b, operands)


@instruction("sqrt", "rsqrt", "rcp", "ex2", "lg2")
def special(operands: Operands) -> Action:
    """To the last bit, where a GPU is near to it."""
    _no_packed(operands)
    operands.only(_FLOAT)
    functions: dict[str, Callable[[Array], Array]] = {
        "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a, "ex2": np.exp2, "lg2": np.log2,
    }  # fmt: skip
    function = functions[operands.parts[0]]
    return _unary(lambda a: function(a.astype(np.float64)).astype(a.dtype), operands)


@instruction("shl", "shr")
def shift(operands: Operands) -> Action:
    """By 32 bits or more all are shifted out, but for signs."""
    dtype = operands.type
    a, amount, put = operands.source(1), operands.source(2, np.dtype("u4")), operands.target()
    left, last = operands.parts[0] == "shl", 8 * dtype.itemsize - 1

    def act(machine: Machine) -> None:
        by = amount(machine)
        kept = np.minimum(by, np.uint32(last)).astype(dtype)
        value = a(machine) << kept if left else a(machine) >> kept
        if dtype.kind == "u" and (by > last).any():
            value = np.where(by > last, dtype.type(0), value)
        put(machine, value)

    return act


@instruction("bfe")
def extract_bits(operands: Operands) -> Action:
    if operands.type.itemsize != 4:
        raise Unsupported(str(operands.one))
    a, put = operands.source(1, np.dtype("u4")), operands.target()
    start, length = operands.source(2, np.dtype("u4")), operands.source(3, np.dtype("u4"))
    signed = operands.type.kind == "i"

    def act(machine: Machine) -> None:
        value = a(machine).astype(np.int64)
        first, count = (x(machine).astype(np.int64) & 255 for x in (start, length))
        if signed:
            value = value.astype(np.uint32).view(np.int32).astype(np.int64)
        kept = np.minimum(count, 32)
        found = (value >> np.minimum(first, 63)) & ((1 << kept) - 1)
        if signed:
            sign = (found >> np.maximum(kept - 1, 0)) & 1
            found = np.where((sign == 1) & (kept > 0), found - (1 << kept), found)
        put(machine, found.astype(np.uint32))

    return act


@instruction("clz", "popc")
def count_bits(operands: Operands) -> Action:
    bits, put = 8 * operands.type.itemsize, operands.target()
    a = operands.source(1)
    if operands.parts[0] == "popc":
        return lambda machine: put(machine, np.bitwise_count(a(machine)).astype(np.uint32))

    def act(machine: Machine) -> None:
        value = a(machine)
        places = np.arange(bits, dtype=value.dtype)
        length = (((value[:, None] >> places) & value.dtype.type(1)) * (places + value.dtype.type(1))).max(1)
        put(machine, (bits - length).astype(np.uint32))

    return act


@instruction("setp")
def compare(operands: Operands) -> Action:
    """`setp.lt.s32 p, a, b`, and `setp.lt.and.s32 p, a, b, q`."""
    _no_packed(operands)
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
        "ne": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    }  # fmt: skip
    _, name, *combined, _ = operands.parts
    combined = [part for part in combined if part != "ftz"]
    unordered = name in ("ltu", "leu", "gtu", "geu", "equ", "neu")
    name = name[:2] if unordered else name
    if name not in functions or combined not in ([], ["and"], ["or"], ["xor"]) or "|" in operands.texts[0]:
        raise Unsupported(str(operands.one))
    a, b, put, function = operands.source(1), operands.source(2), operands.target(), functions[name]
    other = operands.source(3, np.dtype(bool)) if combined else None
    ordered_only = name == "ne" and not unordered and operands.type.kind == "f"

    def act(machine: Machine) -> None:
        left, right = a(machine), b(machine)
        found = function(left, right)
        if unordered or ordered_only:
            unequal = np.isnan(left) | np.isnan(right)
            found = found | unequal if unordered else found & ~unequal
        if other is not None:
            join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combined[0]]
            found = join(found, other(machine))
        put(machine, found)

    return act
