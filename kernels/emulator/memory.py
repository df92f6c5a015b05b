"""Global memory, as the tensors of a launch, and the shared memory of CTAs."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from .errors import Fault
from .races import PLACE, GlobalAccesses, SharedAccesses
from .traffic import Traffic, Unwatched
from .transfers import Report
from .values import Array

_ROOM = 16  # bytes of the largest access


class Who(NamedTuple):
    """The threads of an access, each with its stamp, the CTA of its launch (from 1 on) and of its batch (from 0)."""

    stamps: Array
    ctas: Array
    places: Array


class Region:
    """The memory of a tensor.

    Args:
        name: to be named by.
        address: of its first byte, a multiple of 16.
        size: in bytes.
        counted: what is asked for is counted, instead of watching for races.
    """

    def __init__(self, name: str, address: int, size: int, counted: bool = False) -> None:
        if address % _ROOM:
            raise Fault(f"{name} lies at {address:#x}, which is no multiple of {_ROOM}")
        self.name, self.address, self.size = name, address, size
        self.bytes: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        places = (size // _ROOM + 1) * _ROOM // PLACE
        self.accesses: GlobalAccesses | Traffic = Traffic(places) if counted else GlobalAccesses(places)


def _elements(memory: Array, size: int, vector: int) -> Array:
    """As `[n, vector]` of unsigned numbers of so many bytes."""
    whole = len(memory) // (size * vector) * (size * vector)
    return memory[:whole].view(f"u{size}").reshape(-1, vector)


def _places(index: Array, size: int) -> tuple[Array, int]:
    """Of accesses in units of so many bytes: their index in units of places, and how many they are."""
    return (index, size // PLACE) if size >= PLACE else (index * size // PLACE, 1)


class GlobalMemory:
    """All that a kernel may touch: the tensors that it was given."""

    def __init__(self, tensors: list[Region]) -> None:
        self.tensors = sorted(tensors, key=lambda tensor: tensor.address)
        self.starts = np.array([tensor.address for tensor in self.tensors], np.int64)

    def _parts(self, addresses: Array, size: int, what: str) -> list[tuple[Region, Any]]:
        """Each tensor, and which of the accesses go to it."""
        if (addresses % size).any():
            wrong = int(addresses[addresses % size != 0][0])
            raise Fault(f"global {what} of {size} bytes at {wrong:#x}, which is no multiple of that")
        owners = np.searchsorted(self.starts, addresses, side="right") - 1
        parts = []
        for owner in np.unique(owners):
            mine = owners == owner
            tensor = self.tensors[max(owner, 0)]
            beyond = addresses[mine] + size > tensor.address + tensor.size
            if owner < 0 or beyond.any():
                wrong = int(addresses[mine][beyond][0] if beyond.any() else addresses[mine][0])
                raise Fault(
                    f"global {what} of {size} bytes at {wrong:#x}, outside of all tensors: "
                    f"{wrong - tensor.address} bytes from the start of {tensor.name}, which has {tensor.size}"
                )
            parts.append((tensor, slice(None) if mine.all() else mine))
        return parts

    def load(self, addresses: Array, size: int, vector: int, who: Who, report: Report) -> Array:
        """`[n, vector]` unsigned numbers of `size` bytes."""
        found = np.empty((len(addresses), vector), f"u{size}")
        for tensor, part in self._parts(addresses, size * vector, "load"):
            index = (addresses[part] - tensor.address) // (size * vector)
            found[part] = _elements(tensor.bytes, size, vector)[index]
            places, width = _places(index, size * vector)
            tensor.accesses.note_read_of(places, width, who.stamps[part], who.ctas[part], _named(report, tensor.name))
        return found

    def store(self, addresses: Array, values: Array, who: Who, report: Report) -> None:
        """`values [n, vector]` of unsigned numbers."""
        size, vector = values.dtype.itemsize, values.shape[1]
        for tensor, part in self._parts(addresses, size * vector, "store"):
            index = (addresses[part] - tensor.address) // (size * vector)
            memory = _elements(tensor.bytes, size, vector)
            memory[index] = values[part]
            own = _named(report, tensor.name)
            own("different values by one store", memory[index] != values[part])
            places, width = _places(index, size * vector)
            tensor.accesses.note_write_of(places, width, who.stamps[part], who.ctas[part], own)


class SharedMemory:
    """Of some CTAs that run side by side; new memory is full of ones, which are NaN as floats.

    Args:
        ctas: their number.
        size: bytes of each.
        warps: of each.
        warpgroups: of each.
        watched: for races.
    """

    def __init__(self, ctas: int, size: int, warps: int, warpgroups: int, watched: bool = True) -> None:
        self.size = -(-max(size, 1) // 1024) * 1024  # what swizzles look at stays as it is
        self.declared = size
        self.bytes = np.full(ctas * self.size, 0xFF, np.uint8)
        kind = SharedAccesses if watched else Unwatched
        self.accesses = kind(ctas, self.size // PLACE, warps, warpgroups)

    def index(self, addresses: Array, size: int, places: Array, what: str) -> Array:
        """Of accesses to addresses within a CTA's memory, in units of their size."""
        if (addresses % size).any():
            raise Fault(f"shared {what} of {size} bytes at {addresses[addresses % size != 0][0]}, no multiple of that")
        if len(addresses) and (addresses.min() < 0 or addresses.max() + size > self.declared):
            raise Fault(f"shared {what} at {addresses.min()} to {addresses.max()}, of {self.declared} bytes")
        return (places * self.size + addresses) // size

    def load(self, addresses: Array, size: int, vector: int, who: Who, report: Report) -> Array:
        index = self.index(addresses, size * vector, who.places, "load")
        places, width = _places(index, size * vector)
        self.accesses.note_access(places, width, who.stamps, who.places, False, _named(report, "shared"))
        return _elements(self.bytes, size, vector)[index]

    def store(self, addresses: Array, values: Array, who: Who, report: Report) -> None:
        size, vector = values.dtype.itemsize, values.shape[1]
        index, own = self.index(addresses, size * vector, who.places, "store"), _named(report, "shared")
        memory = _elements(self.bytes, size, vector)
        memory[index] = values
        own("different values by one store", memory[index] != values)
        places, width = _places(index, size * vector)
        self.accesses.note_access(places, width, who.stamps, who.places, True, own)

    def copy(self, addresses: Array, values: Array, who: Who, report: Report) -> None:
        """`values [n, bytes]` by `cp.async`."""
        size = values.shape[1]
        index = self.index(addresses, size, who.places, "cp.async")
        _elements(self.bytes, 1, size)[index] = values
        self.accesses.note_copy(*_places(index, size), who.stamps, who.places, _named(report, "shared"))

    def load_boxes(self, addresses: Array, values: Array, who: Who, tickets: Array, report: Report) -> None:
        """`values [n, chunks, bytes]` by TMA, to chunks at `addresses [n, chunks]`."""
        index, stamps, places = self._chunks(addresses, values.shape[2], who)
        _elements(self.bytes, 1, values.shape[2])[index] = values.reshape(len(index), -1)
        tickets = np.repeat(tickets, addresses.shape[1])
        at, width = _places(index, values.shape[2])
        self.accesses.note_load(at, width, stamps, places, tickets, _named(report, "shared"))

    def store_boxes(self, addresses: Array, size: int, who: Who, report: Report) -> Array:
        """Of chunks at `addresses [n, chunks]`, by TMA: `[n, chunks, size]` bytes."""
        index, stamps, places = self._chunks(addresses, size, who)
        self.accesses.note_store(*_places(index, size), stamps, places, _named(report, "shared"))
        return _elements(self.bytes, 1, size)[index].reshape(*addresses.shape, size)

    def _chunks(self, addresses: Array, size: int, who: Who) -> tuple[Array, Array, Array]:
        stamps, places = (np.repeat(one, addresses.shape[1]) for one in (who.stamps, who.places))
        return self.index(addresses.ravel(), size, places, "TMA copy"), stamps, places

    def note_barrier(self, addresses: Array, who: Who, write: bool, report: Report) -> None:
        """That mbarriers are made or ended, or used."""
        at, width = _places(self.index(addresses, 8, who.places, "mbarrier"), 8)
        note = self.accesses.note_write if write else self.accesses.note_read
        note(at, width, who.stamps, _named(report, "an mbarrier"))

    def operands(self, addresses: Array, size: int, who: Who, group: int, report: Report) -> Array:
        """Of chunks of `size` bytes at `addresses [n, a, b]`: `[n, a, b, size]`, for products by a group of n CTAs."""
        index, stamps, places = self._chunks(addresses.reshape(len(addresses), -1), size, who)
        self.accesses.note_product(*_places(index, size), stamps, places, group, _named(report, "shared"))
        return _elements(self.bytes, 1, size)[index].reshape(*addresses.shape, size)


def _named(report: Report, where: str) -> Report:
    return lambda what, mask: report(f"{what} in {where}", mask)
