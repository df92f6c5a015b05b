"""What kernels of all operations share: their helpers, how they are launched, and what autocast does to operators."""

from __future__ import annotations

from collections.abc import Callable
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


def processors() -> int:
    """Multiprocessors of the current device; those of an H100 where there is none."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


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


def int32(numbers: Tensor | None, like: Tensor) -> Tensor | None:
    """Slots or ranks for a kernel, on the device of `like`."""
    if numbers is not None and numbers.dtype != torch.int32:
        numbers = numbers.clamp(-1, torch.iinfo(torch.int32).max)  # too large stays too large
    return None if numbers is None else numbers.to(like.device, torch.int32).contiguous()


def power_of_two(number: int, at_least: int = 1) -> int:
    """The next power of two."""
    return max(1 << (number - 1).bit_length(), at_least)


_LIBRARY = torch.library.Library("hilora", "FRAGMENT")


def under_autocast(name: str, operator: Callable[..., Any], cast: int = 0) -> None:
    """Let autocast take an operator of torch, `hilora::name`, as it stands, its first few arguments cast."""
    for key, device in (("AutocastCUDA", "cuda"), ("AutocastCPU", "cpu")):
        _LIBRARY.impl(name, _cast(operator, device, cast), key)


def _cast(operator: Callable[..., Any], device: str, cast: int) -> Callable[..., Any]:
    def inside(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        narrow = [arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args[:cast]]
        with torch.autocast(device, enabled=False):
            return operator(*narrow, *args[cast:])

    return inside
