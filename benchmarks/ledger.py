"""The ledger of figures: one line of JSON each, appended, never changed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost import Rates, measured_rates
from benchmarks.timing import DEVICE

RESULTS = Path(__file__).with_name("results") / "figures.jsonl"


class Ledger:
    """Appends the figures of one run, each with the conditions that it was measured under."""

    def __init__(self, path: Path, scale: str) -> None:
        self.path, self.scale = path, scale
        now = datetime.now(UTC)
        self.conditions = {
            "run": f"{now:%Y%m%dT%H%M%S}-{os.getpid()}",
            "date": f"{now:%Y-%m-%d}",
            "scale": scale,
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "hilora": revision(),
            **{name: version(name) for name in ("torch", "triton", "peft")},
        }
        self._rates: dict[torch.dtype, Rates] = {}

    def rates(self, dtype: torch.dtype) -> Rates:
        """What the device does in this dtype, measured once a run."""
        if dtype not in self._rates:
            self._rates[dtype] = measured_rates(dtype, self.scale)
        return self._rates[dtype]

    def append(self, figure: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**self.conditions, **figure}, ensure_ascii=False) + "\n")


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """All figures of a ledger, in the order in which they were measured.

    Raises:
        ValueError: naming the line that is no figure, as where a run was cut off while it wrote.
    """
    figures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            figure = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a figure ({error}); delete the line") from error
        figures.append(figure)
    return figures


def device_name() -> str:
    if DEVICE == "cuda":
        return str(torch.cuda.get_device_name())
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    name = models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def revision() -> str:
    """The version, and the commit where the files are in a repository, with a `+` if they have changed since."""
    ask = partial(subprocess.check_output, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    try:
        commit = ask(["git", "rev-parse", "--short", "HEAD"]).strip()
        changed = ask(["git", "status", "--porcelain", "--", "../kernels", "../hilora", "*.py"])
    except (OSError, subprocess.CalledProcessError):
        return version("hilora")
    return f"{version('hilora')} {commit}{'+' if changed else ''}"
