"""mbarriers: made by one thread, waited for by all."""

from __future__ import annotations

import numpy as np

from ..code import Operands, Read, instruction
from ..errors import Unsupported
from ..machine import LANES, Action, Machine
from ..values import Array

_SCOPES = ("shared", "shared::cta", "release", "acquire", "relaxed", "cta")


def _value(operands: Operands, place: int, otherwise: int = 0) -> Read:
    if len(operands.texts) <= place:
        return lambda machine: np.array([otherwise], np.int32)
    return operands.source(place, np.dtype("i4"))


def _modifiers(operands: Operands, names: tuple[str, ...]) -> None:
    for part in operands.parts[1:]:
        if part not in (*names, *_SCOPES, "b64"):
            raise Unsupported(f"the modifier .{part} of {operands.one}")


def _chosen(threads: Array | None, machine: Machine) -> Array:
    return np.arange(machine.size) if threads is None else np.flatnonzero(threads)


@instruction("mbarrier.init", "mbarrier.inval")
def make(operands: Operands) -> Action:
    """Make one, or end it."""
    _modifiers(operands, ("init", "inval"))
    address, count, guard = operands.address(0), _value(operands, 1), operands.guard()
    made = operands.parts[1] == "init"

    def act(machine: Machine) -> None:
        threads = _chosen(guard(machine), machine)
        addresses, who = address(machine)[threads], machine.who(threads)
        machine.shared.note_barrier(addresses, who, True, machine.report)
        if made:
            counts = np.broadcast_to(count(machine), machine.size)[threads]
            machine.barriers.init(addresses, who.places, counts)
        else:
            machine.barriers.invalidate(addresses, who.places)

    return act


@instruction("mbarrier.arrive", "mbarrier.expect_tx")
def arrive(operands: Operands) -> Action:
    """Threads have come, or bytes will."""
    _modifiers(operands, ("arrive", "expect_tx"))
    arrives, expects = operands.parts[1] == "arrive", "expect_tx" in operands.parts
    first = 1 if arrives else 0  # the state of the barrier, which nobody reads, comes before its address
    if arrives and operands.texts[0] != "_":
        raise Unsupported(f"the state of an mbarrier: {operands.one}")
    address, guard = operands.address(first), operands.guard()
    number = _value(operands, first + 1, otherwise=1)

    def act(machine: Machine) -> None:
        threads = _chosen(guard(machine), machine)
        addresses, who = address(machine)[threads], machine.who(threads)
        machine.shared.note_barrier(addresses, who, False, machine.report)
        numbers = np.broadcast_to(number(machine), machine.size)[threads]
        counts = (np.ones_like(numbers) if expects else numbers) if arrives else np.zeros_like(numbers)
        machine.barriers.arrive(addresses, who.places, counts, numbers if expects else np.zeros_like(numbers))
        machine.asleep[:] = False

    return act


@instruction("mbarrier.try_wait", "mbarrier.test_wait")
def wait(operands: Operands) -> Action:
    """Whether a phase has ended. A thread for which it has not sleeps until a barrier changes."""
    _modifiers(operands, ("try_wait", "test_wait", "parity"))
    if "parity" not in operands.parts:
        raise Unsupported(f"the state of an mbarrier: {operands.one}")
    put, address, parity, guard = operands.target(), operands.address(1), _value(operands, 2), operands.guard()

    def act(machine: Machine) -> None:
        threads = _chosen(guard(machine), machine)
        addresses, parities = address(machine), np.broadcast_to(parity(machine), machine.size)
        which = np.stack([threads // LANES, addresses[threads], parities[threads]], 1)
        _, first, of_thread = np.unique(which, axis=0, return_index=True, return_inverse=True)
        once = threads[first]  # threads of a warp ask the same
        who = machine.who(once)
        machine.shared.note_barrier(addresses[once], who, False, machine.report)
        warps = machine.thread[once].astype(np.int64) // LANES
        ended = machine.barriers.test(addresses[once], who.places, warps, parities[once])[of_thread.ravel()]
        found = np.zeros(machine.size, bool)
        found[threads] = ended
        put(machine, found)
        machine.asleep[threads[~ended]] = True

    return act
