"""A contest: rivals must agree with the truth first, then are timed side by side, then are entered in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cost import Cost
from benchmarks.ledger import Ledger
from benchmarks.timing import SECONDS, Inputs, Step, Turn, peak_bytes, ready, take_turns

OF_ONE = 20  # times the tolerance, for one element: a row that was left out hides in the mean of thousands


class WrongResult(AssertionError):
    """A rival computes something else: no figure is taken."""


class Contestant(NamedTuple):
    """One of the rivals.

    Attributes:
        step: what is timed.
        result: what it computes, to be compared with the truth.
        cost: the least that this operation takes.
        tolerance: relative error, root mean square, of each tensor of the result.
        share: of the operation that the step does, where the whole would take too long: its time is divided by that.
    """

    step: Step
    result: Callable[..., Sequence[Tensor]]
    cost: Cost
    tolerance: float
    share: float = 1.0


class Lineup(NamedTuple):
    """Who takes part in a contest.

    Attributes:
        rivals: by name; the first is ours, by whose time the others are divided.
        truth: what the results must be, by the name of a rival, or under "" for all that are not named.
        inputs: sets of inputs for the steps; the first one also for the results.
        dtype: in which the device's rate of arithmetic counts.
        capture: whether a GPU can capture the steps.
        close: to be called when all is done.
        lacking: rivals that are left out, each with the package that it lacks.
    """

    rivals: Mapping[str, Contestant]
    truth: Mapping[str, Sequence[Tensor]]
    inputs: Sequence[Inputs] = ((),)
    dtype: torch.dtype = torch.float32
    capture: bool = True
    close: Callable[[], None] = lambda: None
    lacking: Mapping[str, str] = {}


def contest(benchmark: Any, ledger: Ledger, what: Mapping[str, Any], lineup: Lineup) -> None:
    """Check, time and record.

    Args:
        benchmark: pytest-benchmark's fixture; the ratios go to its `extra_info`.
        ledger: gets a figure for each rival.
        what: the operation and its shape, for the figures.
        lineup: who takes part.

    Raises:
        WrongResult: if any rival's result is off; nothing is recorded then.
        ExceptionGroup: if rivals could not run, once the others are recorded.
    """
    rivals, truth, inputs = lineup.rivals, lineup.truth, lineup.inputs
    ours = next(iter(rivals))
    errors: dict[str, float] = {}
    peaks: dict[str, int] = {}
    turns: dict[str, Turn] = {}
    failures: list[Exception] = []
    for name, rival in rivals.items():
        try:
            errors[name] = _check(name, rival, inputs[0], truth[name if name in truth else ""])
            peaks[name] = peak_bytes(rival.step, inputs[0])
            turns[name] = ready(rival.step, inputs, lineup.capture)
        except Exception as error:
            if name == ours or isinstance(error, WrongResult):
                raise
            error.add_note(f"while running {name}")
            failures.append(error)
    rates = ledger.rates(lineup.dtype)
    timings = take_turns(turns, SECONDS[ledger.scale])
    mine = timings[ours].over(rivals[ours].share)
    for name in turns:
        rival = rivals[name]
        timing, floor = timings[name].over(rival.share), rival.cost.floor(rates)
        ledger.append(
            {
                **what,
                "dtype": str(lineup.dtype).removeprefix("torch."),
                "rival": name,
                "ms": round(1e3 * timing.seconds, 5),
                "ms_quartiles": [round(1e3 * timing.low, 5), round(1e3 * timing.high, 5)],
                "host_ms": None if timing.host is None else round(1e3 * timing.host, 5),
                "floor_ms": round(1e3 * floor, 5),
                "peak_mb": round(peaks[name] / 1e6, 3),
                "share": rival.share,
                "error": float(f"{errors[name]:.2g}"),
                "buffers": len(inputs),
                "tflops": round(rates.flops / 1e12, 3),
                "gb_per_s": round(rates.bandwidth / 1e9, 2),
            }
        )
        ratio = timing.seconds / mine.seconds
        benchmark.extra_info[name] = (
            f"{1e3 * timing.seconds:9.3f} ms {ratio:7.2f} x ours   floor {1e3 * floor:8.3f} ms"
            f"   {peaks[name] / 1e6:9.2f} MB   error {errors[name]:.0e}"
        )
    for name, package in lineup.lacking.items():
        benchmark.extra_info[name] = f"left out: {package} is not installed"
    benchmark.pedantic(rivals[ours].step, args=inputs[0], rounds=1)
    if failures:
        raise ExceptionGroup("some rivals could not run; the figures of the others stand", failures)


def _check(name: str, rival: Contestant, one: Inputs, truth: Sequence[Tensor]) -> float:
    """The largest relative error, root mean square; not a number is never right."""
    worst = 0.0
    for index, (found, expected) in enumerate(zip(rival.result(*one), truth, strict=True)):
        if found.shape != expected.shape:
            raise WrongResult(f"{name}: result {index} is {tuple(found.shape)}, expected {tuple(expected.shape)}")
        off = found.double() - expected
        size = expected.square().mean().sqrt()
        error, largest = float(off.square().mean().sqrt() / size), float(off.abs().max() / size)
        if not (error <= rival.tolerance and largest <= OF_ONE * rival.tolerance):
            raise WrongResult(
                f"{name}: result {index} is off by {error:.1e} of its size, one element by {largest:.1e}; allowed are "
                f"{rival.tolerance:.0e} and {OF_ONE * rival.tolerance:.0e}: no figure is taken"
            )
        worst = max(worst, error)
    return worst
