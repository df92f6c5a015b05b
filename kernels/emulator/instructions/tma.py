"""Copies of boxes of a tensor between global and shared memory, by TMA.

The values are there at once; that they may not be, the races tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from ..code import PARAMETERS, Operands, instruction
from ..errors import Fault, Unsupported
from ..machine import Action, Machine
from ..memory import Who
from ..tensormaps import BYTES, CHUNK, TensorMap, tensor_map
from ..values import Array

_LOAD = re.compile(r"shared::(?:cluster|cta)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes")
_STORE = re.compile(r"global\.shared::cta(?:\.tile)?\.bulk_group")
_ALIGNED = 128  # bytes, of a box in shared memory


@instruction("cp.async.bulk")
def bulk(operands: Operands) -> Action:
    kind = operands.parts[3]
    if kind == "commit_group":
        return lambda machine: machine.stores.commit(machine.warps(_active(machine)))
    if kind == "wait_group":  # whether for reads alone makes no difference to shared memory
        pending = int(operands.texts[0])
        return lambda machine: machine.stores.wait(machine.warps(_active(machine)), pending)
    how = ".".join(operands.parts[5:])
    if kind == "tensor" and _LOAD.fullmatch(how):
        return _load(operands)
    if kind == "tensor" and _STORE.fullmatch(how):
        return _store(operands)
    raise Unsupported(f"TMA of the kind {operands.one}")


def _active(machine: Machine) -> Array | slice:
    return slice(None) if machine.active is None else np.flatnonzero(machine.active)


Boxes = Callable[[Machine], Iterator[tuple[TensorMap, Array, Array]]]


def _boxes(operands: Operands, place: int) -> Boxes:
    """Of `[descriptor, {coordinates}]`: each tensor map, the threads that copy a box of it, and where these begin."""
    found = re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{(.*)\}\s*\]", operands.texts[place])
    if found is None:
        raise Unsupported(str(operands.one))
    descriptor = operands.read(found[1], np.dtype("u8"))
    axes = [operands.read(text.strip(), np.dtype("i4")) for text in found[2].split(",")]
    guard = operands.guard()

    def boxes(machine: Machine) -> Iterator[tuple[TensorMap, Array, Array]]:
        chosen = guard(machine)
        threads = np.arange(machine.size) if chosen is None else np.flatnonzero(chosen)
        addresses = np.broadcast_to(descriptor(machine), machine.size)[threads]
        for address in np.unique(addresses).tolist():
            mine = threads[addresses == address]
            corners = np.stack([np.broadcast_to(axis(machine), machine.size)[mine] for axis in axes], 1)
            yield _map_at(address, len(axes), machine), mine, corners

    return boxes


def _map_at(address: int, axes: int, machine: Machine) -> TensorMap:
    index, beyond = divmod(address - PARAMETERS, BYTES)
    arguments = machine.arguments
    descriptor = arguments[index] if 0 <= index < len(arguments) and not beyond else None
    if not isinstance(descriptor, bytes):
        raise Unsupported(f"a TMA descriptor in memory: {machine.now}")
    found = tensor_map(descriptor)
    if len(found.sizes) != axes:
        raise Fault(f"{machine.now}: of a tensor with {len(found.sizes)} axes")
    return found


def _repeated(who: Who, rows: Array) -> Who:
    return Who(*(part[rows] for part in who))


def _parts(addresses: Array, inside: Array, element: int) -> Iterator[tuple[Array, int]]:
    """Which elements `[n, elements]` go in chunks, and which one by one; the elements of each access."""
    together = CHUNK // element
    grouped = inside.reshape(len(inside), -1, together)
    whole = grouped.all(2) & (addresses.reshape(grouped.shape)[:, :, 0] % CHUNK == 0)
    yield np.flatnonzero(whole) * together, together
    yield np.flatnonzero(grouped & ~whole[:, :, None]), 1


def _starts(address: Array, machine: Machine) -> Array:
    if (address % _ALIGNED).any():
        raise Fault(f"{machine.now}: a box at {address[address % _ALIGNED != 0][0]}, no multiple of {_ALIGNED} bytes")
    return address


def _load(operands: Operands) -> Action:
    if len(operands.texts) > 3 or operands.parts[4] == "1d":
        raise Unsupported(str(operands.one))
    target, boxes, barrier = operands.address(0), _boxes(operands, 1), operands.address(2)

    def act(machine: Machine) -> None:
        for tensor, threads, corners in boxes(machine):
            who = machine.who(threads)
            addresses, inside = tensor.elements(corners)
            values = np.zeros(addresses.shape, f"u{tensor.element}")
            if tensor.nan:
                values[:] = {2: 0x7FFF, 4: 0x7FFFFFFF}[tensor.element]
            for which, together in _parts(addresses, inside, tensor.element):
                size = min(tensor.element * together, 4)
                count = tensor.element * together // size
                rows = which // addresses.shape[1]
                found = machine.memory.load(
                    addresses.ravel()[which], size, count, _repeated(who, rows), machine.report
                )  # fmt: skip
                values.reshape(-1, together)[which // together] = found.view(values.dtype)
            chunks = tensor.chunks(_starts(target(machine)[threads], machine))
            at = barrier(machine)[threads]
            machine.shared.note_barrier(at, who, False, machine.report)
            tickets = machine.barriers.copied(at, who.places, tensor.bytes)
            image = values.view(np.uint8).reshape(len(threads), -1, CHUNK)
            machine.shared.load_boxes(chunks, image, who, tickets, machine.report)
            machine.asleep[:] = False

    return act


def _store(operands: Operands) -> Action:
    if len(operands.texts) > 2 or operands.parts[4] == "1d":
        raise Unsupported(str(operands.one))
    boxes, source = _boxes(operands, 0), operands.address(1)

    def act(machine: Machine) -> None:
        for tensor, threads, corners in boxes(machine):
            who = machine.who(threads)
            chunks = tensor.chunks(_starts(source(machine)[threads], machine))
            image = machine.shared.store_boxes(chunks, CHUNK, who, machine.report)
            addresses, inside = tensor.elements(corners)
            values = np.ascontiguousarray(image).view(f"u{tensor.element}").reshape(addresses.shape)
            for which, together in _parts(addresses, inside, tensor.element):
                size = min(tensor.element * together, 4)
                given = np.ascontiguousarray(values.reshape(-1, together)[which // together]).view(f"u{size}")
                rows = which // addresses.shape[1]
                machine.memory.store(
                    addresses.ravel()[which], given, _repeated(who, rows), machine.report
                )  # fmt: skip

    return act
