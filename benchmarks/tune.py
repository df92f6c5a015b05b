"""Measure on this GPU what `devices.json` says of it, and write its row: `python -m benchmarks.tune`.

Tiles of the kernels that own rows and of the product, at the shape of a ViT-B: compiled side by side on all cores, and
then timed one after another; then from how many rows on one kernel a direction is ahead, and up to which width the
fused plan is. A tile that does not fit is passed over. Nothing is written but the row of this device, after each of
these, with what was measured in its source.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from benchmarks.kernels import SHAPES
from benchmarks.layer_calls import again, launches, passes
from benchmarks.timing import DEVICE, SCALES, SECONDS, Turn, ready, take_turns
from hilora.files import write_text
from hilora.kernels import launch
from hilora.kernels.backends import TRITON
from hilora.kernels.launch import Tile
from hilora.kernels.precompile import Pretended
from hilora.kernels.stacked_linear import devices, hopper, plan
from hilora.reporting.machine import device_name, today, versions

CANDIDATES = {
    "rows": [Tile(BM, 64, 64, warps, stages) for BM in (64, 128) for warps in (4, 8) for stages in (2, 3, 4)],
    "gemm of wide tiles": [Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3)],
    "gemm": [Tile(128, 128, 64, warps, stages) for warps in (4, 8) for stages in (3, 4)],
}
OF = {"rows": ("shrink_expand", "backward_rows"), "gemm": ("gemm",), "gemm of wide tiles": ("gemm",)}
PLANS = {"rows": "split", "gemm": "fused", "gemm of wide tiles": "fused"}  # whose passes have those kernels
Call = tuple[devices.Device, str, int, int]  # with the row, by the plan, of so many rows of a width
ROWS, WIDTHS = (64, 128, 256, 512, 1024, 4096), (192, 384, 512, 768, 1024, 1280)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default=DEVICE)
    parser.add_argument("--table", type=Path, default=devices.PATH, help="to write to (default: the package's)")
    given = parser.parse_args(arguments)
    rows, width = SHAPES[given.scale]
    widths = WIDTHS if given.scale == "cuda" else (64,)
    row, name, measured = devices.device(torch.device(DEVICE)), device_name(torch.device(DEVICE)), list[str]()

    def found(what: str, **fields: Any) -> devices.Device:
        measured.append(what)
        source = f"measured {today()}, {_toolchain()}: {', '.join(measured)}"
        new: devices.Device = row._replace(source=source, **fields)
        write(given.table, name, new)
        return new

    tried = {case: tiles for case, tiles in CANDIDATES.items() if case in row.tiles}
    if given.scale == "toy":
        tried = {case: tiles[:1] for case, tiles in tried.items()}
    arch = launch.architecture()
    if arch:
        of_tiles = ((case, tile) for case, tiles in tried.items() for tile in tiles)
        compile_ahead([(with_tile(row, case, tile), PLANS[case], rows, width) for case, tile in of_tiles], arch)
    for case, tiles in tried.items():
        best = _best_tile(row, case, tiles, rows, width, given.scale)
        row = found(f"tiles of {case}", tiles=row.tiles | {case: best})
    tuned = row
    if arch:
        alone = tuned._replace(one_kernel_from=None)
        few = [(one, name, ROWS[0], width) for one in (tuned, alone) for name in TRITON]
        compile_ahead([*few, *((alone, name, rows, wide) for wide in widths for name in TRITON)], arch)
    if row.one_kernel_from is not None:
        ahead = _least(ROWS, lambda many: _one_kernel_is_ahead(tuned, many, width, given.scale))
        row = found("one kernel", one_kernel_from=ahead)
    lost = _least(widths, lambda wide: not _fused_is_ahead(tuned, rows, wide, given.scale))
    row = found("plans", fused_below=_operations(lost) if lost is not None else _operations(max(widths)) + 1)


def write(table: Path, name: str, row: devices.Device) -> None:
    """Put a row into a table, which need not be there, in the place of the device's own if there is one."""
    fields = {key: value for key, value in row._asdict().items() if key != "name" and value is not None}
    found = json.loads(table.read_text()) if table.exists() else {}
    write_text(table, json.dumps(found | {name: fields}, indent=2) + "\n")
    print(f"{table}: {name}: {fields}", flush=True)


def _operations(width: int) -> int:
    """FLOP of a qkv of a width per element of x and y."""
    return 2 * 3 * width * width // (4 * width)


def with_tile(row: devices.Device, case: str, tile: Tile) -> devices.Device:
    """A row by which a tile serves its case: where wide tiles could serve as well, they must not."""
    others = {name: own for name, own in row.tiles.items() if not (case == "gemm" and name == "gemm of wide tiles")}
    return row._replace(tiles=others | {case: tile}, one_kernel_from=None)


def compile_ahead(calls: Iterable[Call], arch: int) -> None:
    """Into Triton's cache, by processes of their own. What does not compile is met again as it is timed."""
    with suppress(BrokenProcessPool), ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for call in calls:
            pool.submit(_compile, *call, arch)


def _compile(row: devices.Device, plan: str, rows: int, width: int, arch: int) -> None:
    triton.runtime.driver.set_active(Pretended(arch))
    launch.launcher = lambda kernel, grid, args, constants: kernel.warmup(*args, grid=grid, **constants)
    with _as(row):
        passes(rows, width, plan, device="meta").step()


def _best_tile(row: devices.Device, case: str, candidates: Sequence[Tile], rows: int, width: int, scale: str) -> Tile:
    times = {}
    for tile in candidates:
        tried = with_tile(row, case, tile)
        try:
            with _as(tried), launches() as found:
                passes(rows, width, PLANS[case]).step()
            turns = {str(i): ready(again(one), [()]) for i, one in enumerate(found) if one[0].__name__ in OF[case]}
        except OutOfResources as error:
            print(f"{case} {tile}: {error}", flush=True)
            continue
        times[tile] = sum(timing.seconds for timing in take_turns(turns, SECONDS[scale] / 10).values())
        print(f"{case} {tile}: {1e6 * times[tile]:.1f} µs", flush=True)
    return min(times, key=lambda tile: times[tile]) if times else row.tiles[case]


def _one_kernel_is_ahead(row: devices.Device, rows: int, width: int, scale: str) -> bool:
    with _as(row._replace(one_kernel_from=0)):
        one = ready(passes(rows, width, "fused").step, [()])
    with _as(row._replace(one_kernel_from=None)):
        others = {name: ready(passes(rows, width, name).step, [()]) for name in ("fused", "split")}
    return _first_is_ahead({"one kernel": one, **others}, f"{rows} rows", scale)


def _fused_is_ahead(row: devices.Device, rows: int, width: int, scale: str) -> bool:
    with _as(row._replace(one_kernel_from=None)):
        turns = {name: ready(passes(rows, width, name).step, [()]) for name in ("fused", "split")}
    return _first_is_ahead(turns, f"width {width}", scale)


def _first_is_ahead(turns: dict[str, Turn], where: str, scale: str) -> bool:
    times = {name: timing.seconds for name, timing in take_turns(turns, SECONDS[scale] / 5).items()}
    print(f"{where}: " + ", ".join(f"{name} {1e6 * seconds:.1f} µs" for name, seconds in times.items()), flush=True)
    first = next(iter(times))
    return times[first] == min(times.values())


def _least(values: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The smallest value from which on it holds for all."""
    found = None
    for value in sorted(values, reverse=True):
        if not holds(value):
            break
        found = value
    return found


@contextmanager
def _as(row: devices.Device) -> Iterator[None]:
    """Let a row be this device's."""
    modules = (plan, hopper)
    for module in modules:
        module.device = lambda *of: row  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.device = devices.device  # type: ignore[attr-defined]


def _toolchain() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions("torch", "triton").items())


if __name__ == "__main__":
    main()
