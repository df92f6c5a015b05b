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


class Constants(dict[str, Any]):
    """A kernel's constants by name, with a tile its sizes among them; their hash is taken once. Not to be changed."""

    def __init__(self, tile: Tile | None = None, **constants: Any) -> None:
        if tile is not None:
            sizes = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "num_warps": tile.warps, "num_stages": tile.stages}
            constants |= sizes
        super().__init__(constants)
        self._hash = hash(tuple(constants.values()))

    def __hash__(self) -> int:  # type: ignore[override]
        return self._hash


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


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Constants) -> None:
    """Launch a kernel, whose constants follow its other arguments.

    What was compiled is found again by all that Triton compiles anew for, without Triton's own search, which takes
    longer than the launch.
    """
    if interpreting():
        kernel[grid](*args, **constants)
        return
    device = triton.runtime.driver.active.get_current_device()
    key = id(kernel), device, constants, *map(kind, args)
    found = _COMPILED.get(key)
    if found is None:
        compiled = kernel.warmup(*args, grid=grid, **constants)
        found = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _COMPILED[key] = found
    compiled, rest = found
    compiled[(*grid, 1, 1)[:3]](*args, *rest)


_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def kind(arg: Any) -> Any:
    """What Triton compiles anew for, of an argument's type and value."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16
    if isinstance(arg, tuple):
        return tuple(map(kind, arg))
    if isinstance(arg, int):
        return "1" if arg == 1 else ("64" if arg >> 31 else "32", arg % 16 == 0)
    if arg is None or isinstance(arg, float):
        return arg is None
    return arg.base.dtype, *arg.block_shape  # a tensor descriptor


launcher = run  # `precompile` puts another in its place


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, constants: Constants) -> None:
    """Run a kernel on the current device."""
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
