"""Time rivals side by side, in turns, so that all see the same machine.

On a GPU a step is captured once as a CUDA graph, over as many sets of inputs as overflow the L2 cache, and its replays
are timed: the device's time, without Python's. How long Python takes to submit a step is measured apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[..., object]
Inputs = tuple[Tensor, ...]
SECONDS = {"toy": 0.05, "cpu": 1.2, "cuda": 1.0}  # that the rivals of one contest are timed for, all together
SCALES = tuple(SECONDS)  # of the shapes
TURN = 0.02  # seconds that a turn lasts at least: short steps are repeated within it


class Timing(NamedTuple):
    seconds: float  # the median over turns,
    low: float  # the first quartile
    high: float  # and the third
    host: float | None  # until the call returns, on a GPU: the rest is hidden behind the device

    def over(self, share: float) -> Timing:
        """Of the whole, where a share was timed."""
        host = None if self.host is None else self.host / share
        return Timing(self.seconds / share, self.low / share, self.high / share, host)


class Turn(NamedTuple):
    """A step that is ready to be timed: its seconds, each time it is called, and Python's share."""

    seconds: Callable[[], float]
    host: float | None


def ready(step: Step, inputs: Sequence[Inputs], capture: bool = True) -> Turn:
    """Find out how often to call a step that is warm, and on a GPU capture it.

    Args:
        step: called with a set of inputs each time.
        inputs: on a GPU as many sets as `rotation` says, elsewhere one.
        capture: whether it can be captured; what loads data and waits for results can not, and is timed by the clock.
    """
    if DEVICE == "cuda" and capture:
        return Turn(_captured(step, inputs), _host_seconds(step, inputs[0]))
    return Turn(_called(step, inputs), None)


def take_turns(turns: Mapping[str, Turn], seconds: float) -> dict[str, Timing]:
    """Time all for so many seconds together; but each has three turns at least."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    started = perf_counter()
    for count in range(51):
        if count >= 3 and perf_counter() - started > seconds:
            break
        for name, turn in turns.items():
            times[name].append(turn.seconds())
    return {name: Timing(median(t), *_quartiles(t), turns[name].host) for name, t in times.items()}


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = quantiles(values, n=4)
    return low, high


def rotation(inputs_bytes: int) -> int:
    """How many sets of inputs overflow the caches twice: 1 without a GPU, where a batch is no larger in use."""
    if DEVICE == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(2, -(-2 * cache // max(inputs_bytes, 1))), 32)


def _called(step: Step, inputs: Sequence[Inputs]) -> Callable[[], float]:
    def turn(inner: int) -> float:
        _finish()
        started = perf_counter()
        for index in range(inner):
            step(*inputs[index % len(inputs)])
        _finish()
        return (perf_counter() - started) / inner

    return partial(turn, max(1, round(TURN / turn(1))))


def _finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _captured(step: Step, inputs: Sequence[Inputs]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what compiles or allocates once must not be captured
        for _ in range(3):
            step(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in inputs:
            step(*one)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(times: int) -> float:
        first.record()
        for _ in range(times):
            graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / (times * len(inputs))

    replay(2)
    inner = max(1, min(1000, round(TURN / (replay(2) * len(inputs)))))
    return lambda: replay(inner)


def _host_seconds(step: Step, one: Inputs) -> float:
    """Until a call returns, the device idle before it."""
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = perf_counter()
        step(*one)
        times.append(perf_counter() - started)
    return median(times[2:])


def peak_bytes(step: Step, one: Inputs) -> int:
    """Memory that a step, once warm, holds at its fullest, beyond what it found."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*one)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(*one)
    held = most = 0
    for event in sorted(_memory_events(profile), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _memory_events(profile: Any) -> list[Any]:
    """Each allocation and, negative, each release; the public view of a profile has sums over functions only."""
    return [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
