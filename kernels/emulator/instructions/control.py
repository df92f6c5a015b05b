"""Branches, barriers and the end."""

from __future__ import annotations

import numpy as np

from ..code import Operands, instruction
from ..errors import Fault, Unsupported
from ..machine import Action, Machine


@instruction("bra")
def branch(operands: Operands) -> Action:
    block, guard = operands.code.program.labels[operands.texts[0]], operands.guard()
    return lambda machine: machine.branch(guard(machine), block)


@instruction("brx")
def indirect_branch(operands: Operands) -> Action:
    program = operands.code.program
    blocks = np.array([program.labels[label] for label in program.targets[operands.texts[1]]])
    index, guard = operands.source(0, np.dtype("u4")), operands.guard()

    def act(machine: Machine) -> None:
        threads = guard(machine)
        chosen = np.broadcast_to(index(machine), machine.size)
        chosen = chosen if threads is None else chosen[threads]
        if chosen.max(initial=0) >= len(blocks):
            raise Fault(f"{machine.now}: index {chosen.max()} of {len(blocks)}")
        machine.at[slice(None) if threads is None else threads] = blocks[chosen]

    return act


@instruction("ret", "exit")
def end(operands: Operands) -> Action:
    guard = operands.guard()
    return lambda machine: machine.end(guard(machine))


@instruction("bar.sync", "barrier.sync")
def barrier(operands: Operands) -> Action:
    """Of all threads of a CTA: others belong to warp specialization."""
    threads = operands.texts[1:]
    if operands.one.guard or (threads and threads != (str(operands.code.program.threads),)):
        raise Unsupported(f"a barrier of some threads: {operands.one}")
    return lambda machine: machine.barrier()


@instruction("bar.warp", "membar", "fence.acq_rel", "fence.sc", "fence.mbarrier_init", "griddepcontrol")
def nothing(operands: Operands) -> Action:
    """Nothing to do where warps run in lockstep, and all memory is seen at once."""
    return lambda machine: None


@instruction("fence.proxy")
def proxy_fence(operands: Operands) -> Action:
    """What warps wrote becomes visible to wgmma and TMA."""
    if operands.parts[2] != "async":
        raise Unsupported(str(operands.one))

    def act(machine: Machine) -> None:
        machine.shared.accesses.fences[machine.whole_ctas()] += 1

    return act


@instruction("elect.sync")
def elect(operands: Operands) -> Action:
    """The first lane, of whole warps."""
    lane, _, predicate = operands.texts[0].partition("|")
    put_lane, put = operands.write(lane.strip()), operands.write(predicate.strip())
    if operands.one.guard:
        raise Unsupported(str(operands.one))

    def act(machine: Machine) -> None:
        machine.whole_warps()
        put_lane(machine, np.zeros(1, np.uint32))
        put(machine, machine.lane == 0)

    return act
