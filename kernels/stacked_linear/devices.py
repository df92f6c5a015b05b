"""What is launched on which GPU: the table `devices.json`, a row for each device.

A row has the name of a device ("NVIDIA H100 80GB HBM3"), where it was measured there (`python -m benchmarks.tune`), or
of an architecture ("sm_90"). A device without a row of its own takes that of its architecture, or of the one before it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..launch import SMALL, Tile, architecture

PATH = Path(__file__).with_name("devices.json")
FEW = 64  # rows of a group


class Device(NamedTuple):
    """A row of the table.

    Attributes:
        name: of the row.
        source: where its numbers are from.
        fused_below: FLOP per element of x and y below which the product takes the low-rank part as a step of its own:
            there, it is bound by memory, and a pass over y is saved. Above, cuBLAS is ahead by more than that pass.
        one_kernel_from: rows of a group from which one kernel a direction serves; None: there is none for this GPU.
        tiles: by kernel and case.
    """

    name: str
    source: str
    fused_below: float
    tiles: dict[str, Tile]
    one_kernel_from: int | None = None

    def gemm_tile(self, dtype: torch.dtype, rows: int, columns: int) -> Tile:
        """Of the product with the base, for so many rows of a group."""
        if dtype == torch.float32:
            return self.tiles["gemm in fp32"]
        if rows <= FEW:
            return self.tiles["gemm of few rows"]
        wide = self.tiles.get("gemm of wide tiles")
        return wide if wide is not None and columns % wide.BN == 0 else self.tiles["gemm"]

    def rows_tile(self, dtype: torch.dtype) -> Tile:
        """Of the kernels that own some rows and go over all columns."""
        return self.tiles["rows in fp32" if dtype == torch.float32 else "rows"]


INTERPRETER = Device(
    "the interpreter",
    "",
    470,
    dict.fromkeys(("gemm", "gemm of few rows", "gemm in fp32", "rows", "rows in fp32"), SMALL),
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def device(of: torch.device) -> Device:
    """The row of a GPU; of anything else, that of the architecture compiled for."""
    if of.type == "cuda":
        return _of_gpu(of.index)
    arch = architecture()
    return _row("", arch) if arch else INTERPRETER


@cache
def _of_gpu(index: int | None) -> Device:
    major, minor = torch.cuda.get_device_capability(index)
    return _row(torch.cuda.get_device_name(index), 10 * major + minor) if architecture() else INTERPRETER


@cache
def _row(name: str, arch: int) -> Device:
    rows = json.loads(PATH.read_text())
    if name not in rows:
        name = max(
            (row for row in rows if row.startswith("sm_") and int(row[3:]) <= arch), key=lambda row: int(row[3:])
        )
    row = rows[name]
    tiles = {kernel: Tile(*sizes) for kernel, sizes in row.pop("tiles").items()}
    return Device(name, tiles=tiles, **row)
