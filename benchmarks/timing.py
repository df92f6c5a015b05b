"""How rivals are timed."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

Step = Callable[[], object]


def interleaved(steps: dict[str, Step], repeats: int = 15, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each step, the steps taken in turns so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warm_up + repeats):
        for name, step in steps.items():
            _finish()
            started = perf_counter()
            step()
            _finish()
            if repeat >= warm_up:
                times[name].append(perf_counter() - started)
    return {name: median(values) for name, values in times.items()}


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
