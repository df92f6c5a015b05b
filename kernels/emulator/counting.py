"""What a launch does, counted: bytes of each tensor, instructions, FLOPs.

All programs of a launch run, so nothing is scaled from a part. What costs most is left out, since no count depends on
it: products by tensor cores are not taken, and races are not watched for. A kernel whose control flow depends on a
product's value would be counted wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .launching import Emulator, compiled, regions, run_all
from .machine import LANES
from .memory import GlobalMemory
from .traffic import SECTOR

CLASSES = {
    "tensor cores": r"wgmma\.mma|mma\.",
    "TMA": r"cp\.async\.bulk\.tensor",
    "global memory": r"(ld|st)\.global|cp\.async\.c[ag]",
    "shared memory": r"(ld|st)\.shared|ldmatrix|stmatrix|shfl",
    "waiting": r"bar|mbarrier|fence|membar|cp\.async|wgmma",
    "control": r"bra|brx|ret|exit|trap",
}
_OTHERS = "arithmetic"
_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)")


class Bytes(NamedTuple):
    """Of a tensor.

    Attributes:
        loaded: that threads and copies asked for, which caches may have.
        stored: likewise.
        read: in distinct sectors of 32 bytes, the least that DRAM has to give.
        written: likewise.
    """

    loaded: int
    stored: int
    read: int
    written: int


class Counts(NamedTuple):
    """Of a launch.

    Attributes:
        instructions: of the PTX, by class, each counted once for every warp that executes it.
        flops: of tensor cores, and of `fma` on fp32.
        tensors: what is moved of each tensor in global memory, by its name.
        flops_of_8_bits: those of `flops` that tensor cores do twice as many of in the same time.
    """

    instructions: Counter[str]
    flops: int
    tensors: dict[str, Bytes]
    flops_of_8_bits: int = 0

    def total(self) -> Bytes:
        """Of all tensors."""
        return Bytes(*map(sum, zip((0,) * 4, *self.tensors.values(), strict=True)))


def count(
    ptx: str, grid: Sequence[int], arguments: Sequence[int | bytes], shared: int, tensors: Mapping[str, Tensor]
) -> Counts:
    """Run all CTAs of a launch; arguments as of `execute`.

    Raises:
        Fault: for what would be an error on a GPU.
        Unsupported: for what is not emulated.
    """
    code = compiled(ptx)
    memory = GlobalMemory(regions(tensors, counted=True))
    visits = run_all(code, grid, arguments, memory, shared, None).tolist()
    instructions: Counter[str] = Counter()
    flops = narrow = 0
    for block, warps in zip(code.program.blocks, visits, strict=True):
        for one in block:
            instructions[_class(one.opcode)] += warps
            flops += int(warps * _flops(one.opcode))
            narrow += int(warps * _flops(one.opcode)) if ".e4m3.e4m3" in one.opcode else 0
    moved = {region.name: _bytes(region.accesses) for region in memory.tensors}
    return Counts(instructions, flops, {name: moved[name] for name in tensors if name in moved}, narrow)


def _bytes(traffic: Any) -> Bytes:
    return Bytes(traffic.loaded, traffic.stored, int(traffic.read.sum()) * SECTOR, int(traffic.written.sum()) * SECTOR)


def _class(opcode: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), _OTHERS)


def _flops(opcode: str) -> float:
    """Of a warp."""
    if re.match(CLASSES["tensor cores"], opcode) and (shape := _SHAPE.search(opcode)):
        rows, columns, depth = map(int, shape.groups())
        return 2 * rows * columns * depth / (4 if opcode.startswith("wg") else 1)
    return 2 * LANES if re.match(r"fma\.\S*f32$", opcode) else 0


class Counting(Emulator):
    """Launches kernels and counts what they do."""

    def count(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Counts:
        """Compile, launch and count.

        Raises:
            Fault: for what would be an error on a GPU.
            Unsupported: for what is not emulated.
        """
        found: Counts = self.result(kernel, grid, args, constants)
        return found

    def emulate(self, *launch: Any) -> Any:
        return count(*launch)
