"""Thread blocks (CTAs) that run side by side: registers, barriers, and which threads are where.

All threads of a batch of CTAs are one numpy axis. Where branches part them, those in the first block of instructions
run until they meet the others again, which they do where the two ways join.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import Fault, Unsupported
from .groups import Groups
from .mbarriers import Barriers
from .memory import GlobalMemory, SharedMemory, Who
from .transfers import WARPS
from .values import Array, unsigned

if TYPE_CHECKING:
    from .code import Code
    from .parsing import Instruction

LANES = 32  # threads of a warp
WARPGROUP = 128  # threads that take a product by wgmma together
_END = np.iinfo(np.int32).max
Action = Callable[["Machine"], None]


class Machine:
    """Some CTAs of a launch.

    Args:
        code: of the kernel.
        grid: of the launch, in x, y and z.
        ctas: numbers of those to run here, from 0 on.
        arguments: of the kernel, as bits; TMA descriptors as bytes.
        memory: the tensors of the launch.
        shared: bytes of each CTA.
        races: what is found, counted by places in memory; None where nothing is watched, and no product is taken.
        clock: the first number for an interval between barriers; see `intervals`.

    Attributes:
        now: the present instruction.
        active: the threads that execute the present instruction; None for all.
        intervals: of each CTA, the number of its interval between barriers.
        asleep: threads for whose wait an mbarrier has to change.
        visits: how many warps have executed each block.
        accumulators: registers that products in flight add to, with the group of each warp group's last such product.
    """

    def __init__(
        self, code: Code, grid: Sequence[int], ctas: Sequence[int], arguments: Sequence[int | bytes],
        memory: GlobalMemory, shared: int, races: Counter[str] | None, clock: int,
    ) -> None:  # fmt: skip
        threads = code.program.threads
        if threads % LANES or threads > (WARPS - 1) * LANES:
            raise Unsupported(f"a CTA of {threads} threads")
        self.code, self.grid, self.arguments, self.memory, self.races = code, grid, arguments, memory, races
        self.warpgroups = max(threads // WARPGROUP, 1)
        self.size = len(ctas) * threads
        self.shared = SharedMemory(len(ctas), shared, threads // LANES, self.warpgroups, races is not None)
        self.place = np.repeat(np.arange(len(ctas)), threads)  # of a thread's CTA in this batch
        self.cta = np.repeat(np.asarray(ctas, np.int32), threads)
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), len(ctas))
        self.lane = self.thread % np.uint32(LANES)
        self.intervals = clock + np.arange(len(ctas), dtype=np.uint32)
        self.clock = clock + len(ctas)
        self.visits = np.zeros(len(code.blocks), np.int64)
        self.registers = [np.zeros(self.size, unsigned(bits)) for bits in code.widths]
        self.at = np.zeros(self.size, np.int32)  # block that a thread executes next
        self.active: Array | None = None
        self.asleep = np.zeros(self.size, bool)
        self._no_groups = np.zeros(len(ctas) * self.warpgroups, np.int32)
        self.accumulators: dict[int, Array] = {}
        self.now: Instruction
        self._stamp()

    def run(self) -> None:
        """To the end of all threads."""
        with np.errstate(all="ignore"):
            while (block := self._next()) != _END:
                here = (self.at == block) & ~self.asleep
                self.active = None if here.all() else here
                self.at[here] = block + 1
                self.visits[block] += np.count_nonzero(here.reshape(-1, LANES).any(1))
                for now, action in self.code.blocks[block]:
                    self.now = now
                    if self.accumulators:
                        self._check_accumulators()
                    action(self)
        self.shared.accesses.transfers.check_end(self.report)

    def _next(self) -> int:
        """The first block that some thread can execute."""
        if not self.asleep.any():
            return int(self.at.min())
        block = int(self.at[~self.asleep].min(initial=_END))
        if block == _END:
            raise Fault(f"{self.code.program.name}: threads wait for an mbarrier that nothing completes")
        return block

    def branch(self, threads: Array | None, block: int) -> None:
        self.at[slice(None) if threads is None else threads] = block

    def end(self, threads: Array | None) -> None:
        self.branch(threads, _END)

    def report(self, what: str, where: Array) -> None:
        """A race at all places where `where` is True."""
        if self.races is not None and (count := int(np.count_nonzero(where))):
            self.races[f"{what}, {self.now.line or self.now}"] += count

    def who(self, threads: Array | slice) -> Who:
        return Who(self.stamps[threads], self.cta[threads] + 1, self.place[threads])

    def whole_warps(self) -> Array | slice:
        """The active threads, of whole warps."""
        return self._whole(LANES)

    def whole_ctas(self) -> Array:
        """The CTAs whose threads are active, all of them."""
        threads = self._whole(self.code.program.threads)
        return np.arange(len(self.intervals)) if isinstance(threads, slice) else np.unique(self.place[threads])

    def _whole(self, size: int) -> Array | slice:
        if self.active is None:
            return slice(None)
        together = self.active.reshape(-1, size)
        if (together.any(1) != together.all(1)).any():
            raise Unsupported(f"{self.now} by some threads of {size}")
        return np.flatnonzero(self.active)

    def barrier(self) -> None:
        ctas = self.whole_ctas()
        self.intervals[ctas] = self.clock + np.arange(len(ctas))
        self.clock += len(ctas)
        self._stamp()
        self.shared.accesses.barrier(ctas, self.agents(ctas))

    def _stamp(self) -> None:
        if self.clock >= 1 << 26:
            raise Unsupported("so many barriers in a launch")
        self.stamps = self.intervals[self.place] * np.uint32(WARPS) + self.thread // np.uint32(LANES)

    def agents(self, ctas: Array) -> Array:
        """All warp groups of these CTAs."""
        return (ctas[:, None] * self.warpgroups + np.arange(self.warpgroups)).ravel()

    def warps(self, threads: Array | slice) -> Array:
        """Numbers of these threads' warps, over all CTAs."""
        return np.unique(np.arange(self.size)[threads] // LANES)

    @property
    def products(self) -> Groups:
        return self.shared.accesses.products

    @property
    def barriers(self) -> Barriers:
        return self.shared.accesses.transfers.barriers

    @property
    def stores(self) -> Groups:
        return self.shared.accesses.transfers.stores

    def wait_for_products(self, pending: int) -> None:
        self.products.wait(self.agents(self.whole_ctas()), pending)
        done = self.products.done
        going = {id(groups): bool((groups > done).any()) for groups in self.accumulators.values()}
        self.accumulators = {number: groups for number, groups in self.accumulators.items() if going[id(groups)]}

    def note_accumulators(self, registers: Sequence[int], agents: Array) -> None:
        """That products of the group that these warp groups have not committed yet add to registers."""
        if self.races is None:
            return
        now: dict[int, Array] = {}  # one for all registers that had the same
        for register in registers:
            before = self.accumulators.get(register, self._no_groups)
            if id(before) not in now:
                now[id(before)] = before.copy()
                now[id(before)][agents] = self.products.committed[agents] + 1
            self.accumulators[register] = now[id(before)]

    def _check_accumulators(self) -> None:
        if self.now.opcode.startswith("wgmma"):
            return
        for register in self.code.touched[self.now] & self.accumulators.keys():
            groups = (self.accumulators[register] > self.products.done).reshape(-1, self.warpgroups)
            threads = np.repeat(groups, self.code.program.threads // self.warpgroups)
            self.report(
                "use of a wgmma's accumulator in flight", threads if self.active is None else threads & self.active
            )
