"""PTX types as numpy's, and the numbers that numpy has no type for.

Registers are kept as unsigned integers (predicates as bool), one element a thread; an instruction looks at them in its
own type. bf16, tf32 and e4m3 are bits: their values are fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import Unsupported

Array = npt.NDArray[Any]
DType = np.dtype[Any]

_KINDS = {"u": "u", "b": "u", "s": "i", "f": "f"}
_TYPES = {
    kind + bits: np.dtype(f"{_KINDS[kind]}{int(bits) // 8}")
    for kind in "ubsf"
    for bits in ("8", "16", "32", "64")
    if kind + bits != "f8"
} | {
    "pred": np.dtype(bool),
    "f16x2": np.dtype("u4"),
    "bf16": np.dtype("u2"),
    "bf16x2": np.dtype("u4"),
    "e4m3x2": np.dtype("u2"),
}


def dtype_of(name: str) -> DType:
    """Numpy's type for a type of PTX, e.g. `s32`; of packed and brain floats, the bits.

    Raises:
        Unsupported: for another one.
    """
    if name not in _TYPES:
        raise Unsupported(f"values of type .{name}")
    return _TYPES[name]


def unsigned(bits: int) -> DType:
    """The type in which a register of so many bits is kept."""
    return np.dtype(bool) if bits == 1 else np.dtype(f"u{bits // 8}")


def resized(value: Array, dtype: DType) -> Array:
    """An integer with its sign or zeros in front, or the lower part of it; bits of anything else of the same size."""
    if value.dtype.itemsize == dtype.itemsize:
        return value.view(dtype)
    return value.view(f"{'i' if value.dtype.kind == 'i' else 'u'}{value.dtype.itemsize}").astype(dtype)


def bf16_bits(value: Array) -> Array:
    """fp32 to the nearest bf16, ties to even."""
    bits = value.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def bf16_value(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def tf32_bits(value: Array) -> Array:
    """fp32 to the nearest tf32, ties away from zero."""
    return (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def e4m3_bits(value: Array) -> Array:
    """fp32 to the nearest e4m3, ties to even; the largest one, 448, for what lies beyond, and one NaN."""
    size, bits = np.abs(value), np.abs(value).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    small = size < 2.0**-6  # multiples of 2⁻⁹
    found = np.where(small, np.rint(np.where(small, size, 0) * 512), rounded.astype(np.int64) - (120 << 3))
    signed = np.minimum(found, 0x7E) + 128 * np.signbit(value)
    return np.where(np.isnan(value), 0x7F, signed).astype(np.uint8)


def _e4m3_values() -> Array:
    exponents, digits = np.divmod(np.arange(128), 8)
    values = np.where(exponents == 0, digits * 2.0**-9, (8 + digits) * 2.0 ** (exponents - 10))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3 = _e4m3_values()
SIZES = {"tf32": 4, "bf16": 2, "f16": 2, "e4m3": 1}  # bytes of an element of a matrix


def element(bits: Array, kind: str) -> Array:
    """fp32 values of a matrix operand of type f16, bf16, tf32 or e4m3; tensor cores ignore the last bits of fp32."""
    if kind == "e4m3":
        return _E4M3[bits.view(np.uint8)]
    if kind == "bf16":
        return bf16_value(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    raise Unsupported(f"matrix operands of type .{kind}")
