"""How kernels are launched: tile sizes, and the precision of products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """Sizes of a program's blocks (rows, output columns, step of the inner product), its warps and pipeline stages."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


SMALL = Tile(16, 32, 32, 4, 1)  # the interpreter takes milliseconds for a product of any size


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return bool(triton.knobs.runtime.interpret)


def architecture() -> int:
    """Compute capability of the current device, as 90 for 9.0; 0 in the interpreter."""
    return 0 if interpreting() else int(triton.runtime.driver.active.get_current_target().arch)


def precision(dtype: torch.dtype) -> str:
    """How a product of this dtype is taken; fp32 as torch takes it, which may be by tf32."""
    if interpreting():
        return "ieee" if dtype == torch.float32 else "upcast"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    kernel[grid](*args, **constants)


launcher = run  # `precompile` puts another in its place


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile | None = None, **constants: Any) -> None:
    """Run a kernel on the current device; with a tile, its sizes are among the constants."""
    if tile is not None:
        constants |= {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "num_warps": tile.warps, "num_stages": tile.stages}
    launcher(kernel, grid, args, constants)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def contiguous_slot(slot: Tensor | None, like: Tensor) -> Tensor | None:
    """Slots for a kernel: int32, on the device of `like`."""
    if slot is not None and slot.dtype != torch.int32:
        slot = slot.clamp(-1, torch.iinfo(torch.int32).max)  # too large stays too large
    return None if slot is None else slot.to(like.device, torch.int32).contiguous()
