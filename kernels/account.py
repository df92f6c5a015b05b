"""What each launch of a call does, counted on a machine without a GPU, beside floors and an estimate of its time.

`python -m hilora.kernels.account --rows 12608 --width 768` goes the way that a call goes, with tensors that have no
values, compiles each kernel that would be launched, and runs all of its programs in the emulator, on zeros: nothing is
measured on a part and scaled. Integers, such as slots, count up from 0. Operations of torch stand beside the kernels,
with the bytes of their arguments and results. It needs gcc, and half a minute of a core at the shape of a ViT-B.

- asked MB: what programs ask memory for, of which caches have a part;
- DRAM MB: what has to come from DRAM or go there, in distinct sectors of 32 bytes;
- warp instructions: of PTX, once for each warp that executes them;
- host µs: of a launch through Triton's launcher, where the driver does nothing; the median of many;
- expected µs: the longer of DRAM bytes over bandwidth, and of FLOPs over a fraction of the rate of a large product,
  twice that for products of 8 bits. Both rates are given, not measured here: by default those of an H100.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from . import launch, precompile
from .backends import TRITON
from .cost import Cost, Rates, layer
from .emulator import driver
from .emulator.counting import Bytes, Counting, Counts
from .emulator.launching import DESCRIPTORS

BANDWIDTH = 3.0e12  # bytes a second, of an H100
FLOPS = {"bf16": 790e12, "fp16": 790e12, "tf32": 395e12, "fp32": 60e12}  # a second, of large products there
LAYERS = {"qkv": (3, 2), "single": (1, 1)}  # columns of y, and those with adapters, in widths
_LAUNCHES = 200  # of which the median is taken
_FREE = (
    "empty",
    "view",
    "_unsafe_view",
    "detach",
    "as_strided",
    "expand",
    "slice",
    "select",
    "t.",
    "transpose",
    "permute",
)
_OVERWRITES = ("copy_", "fill_", "zero_")


class Row(NamedTuple):
    """A launch.

    Attributes:
        host: seconds; of a kernel.
    """

    name: str
    counts: Counts
    host: float = 0.0

    def expected(self, rates: Rates) -> float:
        """Seconds."""
        total = self.counts.total()
        flops = self.counts.flops - self.counts.flops_of_8_bits / 2
        return Cost(((flops, total.read + total.written),)).floor(rates)


class _Values:
    """Tensors with values in the place of those without, as of one launch; what shared memory shares it again."""

    def __init__(self) -> None:
        self._storages: dict[int, Tensor] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, DESCRIPTORS):
            return dataclasses.replace(value, base=self.of(value.base))
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return value
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:
            new = torch.zeros(storage.nbytes(), dtype=torch.uint8)
            if not value.is_floating_point():
                new.view(value.dtype).copy_(torch.arange(new.numel() // value.itemsize))
            self._storages[storage._cdata] = new
        memory = self._storages[storage._cdata].untyped_storage()
        return torch.empty(0, dtype=value.dtype).set_(memory, value.storage_offset(), value.shape, value.stride())


class _Operations(TorchDispatchMode):
    """Notes operations of torch that are launches on a GPU."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self._rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func).removeprefix("aten.")
        if not name.removeprefix("new_").startswith(_FREE):
            counted = flop_registry.get(getattr(torch.ops.aten, func._overloadpacket.__name__.removesuffix("_"), None))
            flops = counted(*args, **kwargs, out_val=result) if counted else 0
            given = args[1:] if name.startswith(_OVERWRITES) else args
            read, written = (_size(part) for part in ((given, kwargs), result))
            moved = {"": Bytes(read, written, read, written)}
            self._rows.append(Row(f"torch.{name}", Counts(Counter(), flops, moved)))
        return result


def _size(values: Any) -> int:
    return sum(one.numel() * one.itemsize for one in tree_leaves(values) if isinstance(one, Tensor))


class Account:
    """Counts what calls launch, on the stand-in for a GPU.

    Args:
        arch: what to compile for, as 90.
    """

    def __init__(self, arch: int) -> None:
        self._counting = Counting(arch)
        self._seen: dict[str, Row] = {}

    def rows(self, call: Callable[[], object]) -> list[Row]:
        """All launches of a call with tensors on the meta device, in their order."""
        found: list[Row] = []

        def launcher(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: launch.Constants) -> None:
            key = f"{kernel.__name__} {grid} {args} {constants}"
            if key not in self._seen:
                self._seen[key] = self._row(kernel, grid, args, constants)
            found.append(self._seen[key])

        with _launched_by(launcher), torch.no_grad(), _Operations(found):
            call()
        return found

    def _row(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: launch.Constants) -> Row:
        with _disable_current_modes():
            values = _Values()
            args = tree_map(values.of, args)
            counts = self._counting.count(kernel, grid, args, constants)
            seconds = []
            with driver.idle():
                for _ in range(_LAUNCHES):
                    start = time.perf_counter()
                    launch.run(kernel, grid, args, constants)
                    seconds.append(time.perf_counter() - start)
        return Row(kernel.__name__, counts, statistics.median(seconds))


@contextmanager
def _launched_by(launcher: Callable[..., None]) -> Iterator[None]:
    before = launch.launcher
    launch.launcher = launcher
    try:
        yield
    finally:
        launch.launcher = before


def layer_calls(
    rows: int, width: int, kind: str, ranks: tuple[int, ...], groups: int, dtype: torch.dtype, plan: str
) -> list[tuple[str, Callable[[], object], Cost]]:
    """Forward and backward of a linear layer whose last tier is in training, and the floor of each."""
    from .stacked_linear import Tier
    from .stacked_linear import plan as plans

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    out, adapted = LAYERS[kind]
    x, weight = empty(groups, rows // groups, width, dtype=dtype), empty(out * width, width, dtype=dtype)
    slot = empty(groups, dtype=torch.int32) if groups > 1 else None
    columns = [(2 * width * index, width) for index in range(adapted)]
    tiers = [
        Tier(empty(groups, rank, width), empty(groups, width, rank), 2.0, slot, part)
        for part in columns
        for rank in ranks
    ]
    trained = [*[False] * (len(ranks) - 1), True] * len(columns)
    y = empty(groups, rows // groups, out * width, dtype=dtype)
    inner: list[Tensor] = []

    def forward() -> None:
        _, *inner[:] = plans.forward(x, weight, empty(out * width, dtype=dtype), tiers, trained, plan)

    def backward() -> None:
        plans.backward(y, inner, x, weight, tiers, trained, plan, True)

    floors = layer(rows, width, ranks, groups, dtype.itemsize, out, adapted)
    return [("forward", forward, floors[0]), ("backward", backward, floors[1])]


HEAD = f"""{"":28}{"host":>8}{"":10}{"asked MB":>18}{"DRAM MB":>18}{"10⁶ warp":>14}{"expected":>10}
{"":28}{"µs":>8}{"GFLOP":>10}{"loaded":>9}{"stored":>9}{"read":>9}{"written":>9}{"instructions":>14}{"µs":>10}"""


def report(rows: list[Row], rates: Rates) -> str:
    """A line for each launch, one for each tensor of a kernel, and the sum."""
    lines = [HEAD]
    for row in rows:
        instructions = row.counts.instructions
        count = instructions.total()
        lines.append(
            f"{row.name:28}{_microseconds(row.host):>8}{row.counts.flops / 1e9:10.2f}"
            f"{_megabytes(row.counts.total())}{count / 1e6:14.3f}{_microseconds(row.expected(rates)):>10}"
        )
        moved = {tensor: moved for tensor, moved in row.counts.tensors.items() if tensor and any(moved)}
        lines += [f"  {tensor:44}{_megabytes(of)}" for tensor, of in moved.items()]
        if count:
            lines.append("  " + ", ".join(f"{kind} {part / count:.1%}" for kind, part in instructions.most_common()))
    host, expected = sum(row.host for row in rows), sum(row.expected(rates) for row in rows)
    total = f"{len(rows)} launches"
    lines.append(f"{total:28}{_microseconds(host):>8}{'':60}{_microseconds(expected):>10}")
    return "\n".join(lines)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds else ""


def _megabytes(moved: Bytes) -> str:
    return "".join(f"{part / 1e6:9.2f}" for part in moved)


def main(arguments: list[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m hilora.kernels.account", description=__doc__, formatter_class=plain)
    parser.add_argument("--rows", type=int, default=12_608, help="of all groups together")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layer", choices=LAYERS, default="qkv", help="q, k and v with adapters on q and v; or one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 8, 8], help="of each tier, the last in training")
    parser.add_argument("--groups", type=int, default=1, help="clients, each with adapters of its own")
    parser.add_argument("--dtype", choices=precompile.DTYPES, default="bf16")
    parser.add_argument("--plan", choices=TRITON, default="split")
    parser.add_argument("--case", help="instead of a layer: what precompile compiles under a name that has this in it")
    parser.add_argument("--arch", choices=driver.ARCHITECTURES, default="sm_90")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes a second")
    parser.add_argument("--flops", type=float, help="a second, in a large product")
    parser.add_argument("--fraction", type=float, default=0.8, help="of that rate which is taken to be reached")
    args = parser.parse_args(arguments)
    if launch.interpreting():
        parser.error("nothing is compiled where TRITON_INTERPRET=1: unset it")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dtype = precompile.DTYPES[args.dtype]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if args.dtype == "tf32" else "ieee"
    peak = Rates(args.flops or FLOPS[args.dtype], args.bandwidth)
    rates = peak._replace(flops=args.fraction * peak.flops)
    account = Account(driver.ARCHITECTURES[args.arch])
    calls: list[tuple[str, Callable[[], object], Cost | None]]
    if args.case:
        every = [case for plan in precompile.plans() for case in plan.cases(dtype)]
        calls = [(name, call, None) for name, call in every if args.case in name]
        if not calls:
            parser.error(f"no case of {args.dtype} has {args.case!r} in its name")
    else:
        ranks = tuple(args.ranks)
        calls = [*layer_calls(args.rows, args.width, args.layer, ranks, args.groups, dtype, args.plan)]
    for name, call, cost in calls:
        floor = f": floor {_microseconds(cost.floor(peak))} µs" if cost else ""
        print(f"{name}{floor}", report(account.rows(call), rates), "", sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
