"""Copies from global to shared memory that a thread does not wait for.

The values are there at once; that they may not be, the races tell.
"""

from __future__ import annotations

import numpy as np

from ..code import Operands, instruction
from ..errors import Unsupported
from ..machine import Action, Machine


@instruction("cp.async")
def copy(operands: Operands) -> Action:
    kind = operands.parts[2]
    if kind == "commit_group":
        return lambda machine: machine.shared.accesses.copies.commit(machine.whole_ctas())
    if kind == "wait_group":
        pending = int(operands.texts[0])
        return lambda machine: machine.shared.accesses.copies.wait(machine.whole_ctas(), pending)
    if kind not in ("ca", "cg"):
        raise Unsupported(f"copies of the kind {operands.one}")
    return _copy(operands)


def _copy(operands: Operands) -> Action:
    """`size` bytes, of which the last ones may be zeros instead of a source's."""
    target, source, guard = operands.address(0), operands.address(1), operands.guard()
    size = int(operands.texts[2], 0)
    given = operands.source(3, np.dtype("u4")) if len(operands.texts) > 3 else None

    def act(machine: Machine) -> None:
        threads = guard(machine)
        chosen = np.arange(machine.size) if threads is None else np.flatnonzero(threads)
        if not len(chosen):
            return
        values = np.zeros((len(chosen), size), np.uint8)
        lengths = np.full(len(chosen), size) if given is None else np.broadcast_to(given(machine), machine.size)[chosen]
        for length in np.unique(lengths[lengths > 0]):
            rows = lengths == length
            if length not in (4, 8, 16):
                raise Unsupported(f"{machine.now} of {length} bytes")
            addresses = source(machine)[chosen[rows]]
            found = machine.memory.load(addresses, 4, length // 4, machine.who(chosen[rows]), machine.report)
            values[rows, :length] = np.ascontiguousarray(found).view(np.uint8)
        machine.shared.copy(target(machine)[chosen], values, machine.who(chosen), machine.report)

    return act
