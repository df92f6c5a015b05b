"""Launches of kernels on CPU tensors, through Triton's launcher to the emulator."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor
from triton.experimental.gluon.nvidia import hopper as gluon
from triton.tools.tensor_descriptor import TensorDescriptor

from . import driver, instructions  # noqa: F401 -- instructions makes the decoders known
from .code import Code
from .errors import Fault
from .machine import Machine
from .memory import GlobalMemory, Region
from .parsing import parse
from .tensormaps import BYTES
from .values import Array

DESCRIPTORS = (TensorDescriptor, gluon.TensorDescriptor)
BATCH = 2048  # threads that run side by side: enough to hide what a call of numpy costs


class RaceError(Exception):
    """Races, by what they are and where, with the number of places in memory."""


@cache
def compiled(ptx: str) -> Code:
    """The code of the one kernel of a PTX module.

    Raises:
        Unsupported: for what is not emulated, by name.
    """
    return Code(parse(ptx))


def execute(
    ptx: str, grid: Sequence[int], arguments: Sequence[int | bytes], shared: int, tensors: Mapping[str, Tensor]
) -> Counter[str]:
    """Run all CTAs of a launch; races that were found.

    Args:
        ptx: of one kernel.
        grid: CTAs in x, y and z.
        arguments: bits of each, bytes of a TMA descriptor.
        shared: bytes for each CTA.
        tensors: on the CPU, by name: the memory that may be touched.

    Raises:
        Fault: for what would be an error on a GPU.
        Unsupported: for what is not emulated.
    """
    races: Counter[str] = Counter()
    run_all(compiled(ptx), grid, arguments, GlobalMemory(regions(tensors)), shared, races)
    return races


def run_all(
    code: Code, grid: Sequence[int], arguments: Sequence[int | bytes], memory: GlobalMemory, shared: int,
    races: Counter[str] | None,
) -> Array:  # fmt: skip
    """All CTAs, a batch at a time; how many warps have executed each block."""
    visits = np.zeros(len(code.blocks), np.int64)
    ctas, clock = range(grid[0] * grid[1] * grid[2]), 1
    together = max(1, BATCH // code.program.threads)
    for first in range(0, len(ctas), together):
        batch = ctas[first : first + together]
        machine = Machine(code, grid, batch, arguments, memory, shared, races, clock)
        machine.run()
        clock = machine.clock
        visits += machine.visits
    return visits


def regions(tensors: Mapping[str, Tensor], counted: bool = False) -> list[Region]:
    """Each storage once, under the first of its names."""
    found: dict[int, Region] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in found:
            found[storage.data_ptr()] = Region(name, storage.data_ptr(), storage.nbytes(), counted)
    return list(found.values())


def named_tensors(names: Sequence[str], values: Sequence[Any]) -> dict[str, Tensor]:
    """Of a kernel's arguments, those in tuples by their index."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, DESCRIPTORS):
            yield name, value.base
        elif isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            for index, one in enumerate(value):
                yield from walk(f"{name}[{index}]", one)

    return dict(pair for name, value in zip(names, values, strict=False) for pair in walk(name, value))


class Emulator:
    """Launches kernels as `hilora.kernels.launch.run` does.

    Args:
        arch: the architecture to compile for, e.g. 90.

    Attributes:
        launches: how many there were of each kernel.
    """

    def __init__(self, arch: int) -> None:
        self.launches: Counter[str] = Counter()
        self._now: dict[str, Any] = {}
        driver.install(arch, self._launched)

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Compile, launch and emulate.

        Raises:
            RaceError: if there is a race.
            Fault: for what would be an error on a GPU.
            Unsupported: for what is not emulated.
        """
        races = self.result(kernel, grid, args, constants)
        self.launches[kernel.__name__] += 1
        if races:
            found = "\n".join(f"  {what}: {count} places" for what, count in sorted(races.items()))
            raise RaceError(f"{kernel.__name__} on a grid of {grid}:\n{found}")

    def result(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """What `emulate` finds out about a launch."""
        self._now = {
            "kernel": kernel.warmup(*args, grid=grid, **constants),
            "tensors": named_tensors(kernel.arg_names, args),
        }
        kernel[grid](*args, **constants)
        now, self._now = self._now, {}
        if "error" in now:
            raise now["error"]
        if "result" not in now:
            raise Fault(f"{kernel.__name__} was not launched")
        return now["result"]

    def emulate(self, *launch: Any) -> Any:
        return execute(*launch)

    def _launched(self, launch: driver.Launched) -> None:
        try:
            ptx = self._now["kernel"].asm["ptx"]
            arguments = _arguments(compiled(ptx), launch)
            self._now["result"] = self.emulate(ptx, launch.grid, arguments, launch.shared, self._now["tensors"])
        except Exception as error:  # ctypes would print and forget it
            self._now["error"] = error


def _arguments(code: Code, launch: driver.Launched) -> list[int | bytes]:
    program = code.program
    if launch.threads != program.threads:
        raise Fault(f"{program.name}: launched with {launch.threads} threads, compiled for {program.threads}")
    types: dict[int, Any] = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
    return [
        ctypes.string_at(launch.arguments[index], size)
        if size == BYTES
        else types[size].from_address(launch.arguments[index]).value
        for index, size in enumerate(program.parameters.values())
    ]
