"""Measure rivals side by side."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

Step = Callable[[], object]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interleaved(steps: dict[str, Step], repeats: int = 9, warm_up: int = 2, inner: int = 1) -> dict[str, float]:
    """Median seconds of each step, taken in turns, so that all see the same machine.

    Short ones are repeated `inner` times a turn: the first after a rival finds cold caches and sleeping threads.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warm_up + repeats):
        for name, step in steps.items():
            _finish()
            started = perf_counter()
            for _ in range(inner):
                step()
            _finish()
            if repeat >= warm_up:
                times[name].append((perf_counter() - started) / inner)
    return {name: median(values) for name, values in times.items()}


def compare(benchmark: Any, steps: dict[str, Step], ours: str, repeats: int = 9, inner: int = 1) -> dict[str, float]:
    """Medians of all steps into the benchmark's `extra_info`: each rival's time over ours. Returns the medians."""
    seconds = interleaved(steps, repeats, inner=inner)
    benchmark.extra_info |= {f"{ours}, ms": round(1e3 * seconds[ours], 3)}
    benchmark.extra_info |= {
        f"{name} / {ours}": round(value / seconds[ours], 2) for name, value in seconds.items() if name != ours
    }
    benchmark.pedantic(steps[ours], rounds=3)
    return seconds


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
