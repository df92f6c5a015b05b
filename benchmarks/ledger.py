"""The ledger of figures: one line of JSON each, appended, never changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost import Rates, measured_rates
from benchmarks.timing import DEVICE
from hilora.errors import FileError
from hilora.files import append_line, read_lines
from hilora.reporting.machine import device_name, revision, today, versions

RESULTS = Path(__file__).with_name("results") / "figures.jsonl"


class Ledger:
    """Appends the figures of one run, each with the conditions that it was measured under."""

    def __init__(self, path: Path, scale: str) -> None:
        self.path, self.scale = path, scale
        now = datetime.now(UTC)
        self.conditions = {
            "run": f"{now:%Y%m%dT%H%M%S}-{os.getpid()}",
            "date": today(),
            "scale": scale,
            "device": device_name(torch.device(DEVICE)),
            "threads": torch.get_num_threads(),
            "hilora": revision(Path(__file__).with_name("*.py")),
            **versions("torch", "triton", "peft"),
        }
        self._rates: dict[torch.dtype, Rates] = {}

    def rates(self, dtype: torch.dtype) -> Rates:
        """What the device does in this dtype, measured once a run."""
        if dtype not in self._rates:
            self._rates[dtype] = measured_rates(dtype, self.scale)
        return self._rates[dtype]

    def append(self, figure: Mapping[str, Any]) -> None:
        append_line(self.path, {**self.conditions, **figure})


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """All figures of a ledger, in the order in which they were measured.

    Raises:
        FileError: naming the line that is no figure, as where a run was cut off while it wrote.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if line.record is None:
            raise FileError(f"{path}, line {number}: not a figure, since it is no JSON object; delete the line")
    return [line.record for line in lines if line.record is not None]
