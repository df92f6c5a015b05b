"""Tensor maps: what a TMA descriptor says of a tensor in global memory, and of the boxes that are copied."""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

import numpy as np

from .errors import Fault, Unsupported
from .values import Array

CHUNK = 16  # bytes that stay together in shared memory
BYTES = 128  # of a descriptor
_MARK = 0x50414D524F534E54  # as in libcuda.c
_FORMAT = struct.Struct("<QQ5Q4Q5H4B")
_ELEMENTS = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)  # bytes, by the code of a type
_WIDTHS = (0, 32, 64, 128)  # bytes of a row, by the code of a swizzle


class TensorMap(NamedTuple):
    """Of a tensor whose first axis is the innermost one, as in all of TMA.

    Attributes:
        base: address of its first element.
        sizes: elements along each axis.
        strides: bytes from one element to the next, of each axis.
        box: elements of what is copied at once.
        element: bytes.
        swizzle: bytes of a row in shared memory, whose chunks change places; 0 for none.
        nan: whether what lies outside is NaN; else it is zero.
    """

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element: int
    swizzle: int
    nan: bool

    @property
    def bytes(self) -> int:
        """Of a box."""
        return int(np.prod(self.box)) * self.element

    def elements(self, corners: Array) -> tuple[Array, Array]:
        """Addresses of a box' elements, as they follow one another in shared memory, and which lie in the tensor.

        Args:
            corners: of n boxes, `[n, axes]`; may be negative.

        Returns:
            `[n, elements]`, both.
        """
        offsets = _offsets(self.box)
        corners = corners.astype(np.int64)
        addresses = (self.base + corners @ np.array(self.strides))[:, None] + np.array(self.strides) @ offsets
        inside = np.ones(addresses.shape, bool)
        for axis, (size, offset) in enumerate(zip(self.sizes, offsets, strict=True)):
            first = corners[:, axis]
            if first.min(initial=0) < 0 or (first + self.box[axis] > size).any():
                places = first[:, None] + offset
                inside &= (places >= 0) & (places < size)
        return addresses, inside

    def chunks(self, starts: Array) -> Array:
        """Addresses `[n, chunks]` in shared memory of n boxes that start at `starts`."""
        place = starts[:, None] + np.arange(0, self.bytes, CHUNK)
        return place ^ (((place >> 7) & (self.swizzle // CHUNK - 1)) << 4) if self.swizzle else place


@cache
def _offsets(box: tuple[int, ...]) -> Array:
    """Of the elements of a box along each axis, `[axes, elements]`."""
    return np.stack(np.unravel_index(np.arange(np.prod(box)), box[::-1])[::-1])


@cache
def tensor_map(descriptor: bytes) -> TensorMap:
    """Of the 128 bytes that the stand-in for libcuda wrote.

    Raises:
        Fault: for any other bytes.
    """
    mark, base, *rest = _FORMAT.unpack_from(descriptor)
    if mark != _MARK:
        raise Fault("a TMA copy whose descriptor is none")
    rank, kind, swizzle, nan = rest[14:]
    box, element = tuple(rest[9 : 9 + rank]), _ELEMENTS[kind]
    width = _WIDTHS[swizzle]
    if width and box[0] * element != width:
        raise Unsupported(f"a TMA box with rows of {box[0] * element} bytes, swizzled over {width}")
    return TensorMap(base, tuple(rest[:rank]), (element, *rest[5 : 4 + rank]), box, element, width, bool(nan))
