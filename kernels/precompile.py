"""Compile every kernel for several GPUs on a machine without one, and look at what came out.

`python -m hilora.kernels.precompile` goes the way that a call goes, with tensors that have no values, and compiles what
would be launched. It prints registers, stack, shared memory and matrix instructions, and fails on a spill, on shared
memory that the GPU does not have, and where a 16-bit product on Hopper misses its tensor cores' own instruction.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import launch
from .backends import folders
from .launch import cdiv

SHARED_MEMORY = {  # bytes of a program
    **dict.fromkeys((80, 87), 166_912),
    **dict.fromkeys((90, 100, 103, 110), 232_448),
    **dict.fromkeys((86, 89, 120, 121), 101_376),
}
ARCHITECTURES = [80, 89, 90, 100]  # that are compiled for unless told otherwise
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class Compiled(NamedTuple):
    """A kernel for an architecture."""

    arch: int
    kernel: str
    case: str
    dtype: str
    tile: str
    registers: int
    stack: int
    shared: int
    instructions: str

    @property
    def fault(self) -> str:
        """What is wrong with it."""
        if self.stack:
            return f"spills: {self.stack} bytes of stack"
        if self.shared > SHARED_MEMORY[self.arch]:
            return f"{self.shared} bytes of shared memory, {SHARED_MEMORY[self.arch]} are there"
        if (
            self.arch == 90
            and self.kernel in products()
            and self.dtype in ("bf16", "fp16")
            and "HGMMA" not in self.instructions
        ):
            return "no HGMMA"
        return ""


class Pretended:
    """Stands in for the driver of a GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # what was compiled is remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0


def plans() -> list[Any]:
    """Of each family of operations: its `plan`, where it has one, says by `cases` what to compile."""
    return [import_module(f"{folder}.plan") for folder in folders() if find_spec(f"{folder}.plan")]


def products() -> set[str]:
    """Kernels that multiply matrices, by the instructions of tensor cores."""
    return {name for plan in plans() for name in getattr(plan, "PRODUCTS", ())}


def compile_all(arch: int, dtypes: Sequence[str] = (), first: int = 0, step: int = 1) -> list[Compiled]:
    """All kernels for an architecture, e.g. 90, in the configurations in which they are launched; or, of those of each
    dtype, every so many-th."""
    triton.runtime.driver.set_active(Pretended(arch))
    found: dict[tuple[str, str, str], Compiled] = {}
    for dtype in dtypes or DTYPES:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        for case, kernel, grid, args, constants in _launches(DTYPES[dtype])[first::step]:
            compiled = kernel.warmup(*args, grid=grid, **constants)
            key = kernel.__name__, compiled.hash, dtype
            if key not in found:
                found[key] = _examine(compiled, arch, kernel.__name__, case, dtype, constants)
    return list(found.values())


def _launches(dtype: torch.dtype) -> list[tuple[str, Any, tuple[int, ...], tuple[Any, ...], launch.Constants]]:
    """Each with its case, and none that would be compiled as one before it."""
    found: dict[Any, Any] = {}
    for case, call in (one for plan in plans() for one in plan.cases(dtype)):

        def note(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: launch.Constants) -> None:
            key = kernel.__name__, constants, launch.kind(args)
            found.setdefault(key, (case, kernel, grid, args, constants))  # noqa: B023

        launch.launcher = note
        call()
    return list(found.values())


def _examine(compiled: Any, arch: int, kernel: str, case: str, dtype: str, constants: dict[str, Any]) -> Compiled:
    tile = " ".join(f"{constants[name]}" for name in ("BM", "BN", "BK", "num_warps", "num_stages") if name in constants)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        if kernel in products():
            command.append("-sass")  # which takes long
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = sorted(set(re.findall(r"\b(?:[HQ]MMA|[HQ]GMMA|UTC\w*MMA|FFMA2?)\b", report)))
    registers, stack = (int(match) for match in re.findall(r"(?:REG|STACK):(\d+)", report))
    shared = compiled.metadata.shared
    return Compiled(arch, kernel, case, dtype, tile, registers, stack, shared, " ".join(instructions))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hilora.kernels.precompile", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of x")
    given = parser.parse_args(arguments)
    cores, pairs = os.cpu_count() or 1, list(product(given.arch, given.dtype))
    step = cdiv(4 * cores, len(pairs))  # so that no core waits long for another
    tasks = [(arch, [dtype], first, step) for arch, dtype in pairs for first in range(step)]
    if launch.interpreting():
        parser.error("nothing is compiled where TRITON_INTERPRET=1: unset it")
    print(f"{'sm':>3}  {'kernel':22}{'for':32}{'x':6}{'tile':20}{'regs':>5}{'stack':>6}{'shared':>8}  instructions")
    faults = 0
    with ProcessPoolExecutor(min(len(tasks), cores), mp_context=get_context("spawn")) as pool:
        for table in pool.map(compile_all, *zip(*tasks, strict=True)):
            for row in table:
                faults += bool(row.fault)
                print(
                    f"{row.arch:>3}  {row.kernel:22}{row.case:32}{row.dtype:6}{row.tile:20}{row.registers:>5}"
                    f"{row.stack:>6}{row.shared:>8}  {row.instructions}{'   ' * bool(row.fault)}{row.fault.upper()}",
                    flush=True,
                )
    print(f"triton {triton.__version__}: {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
