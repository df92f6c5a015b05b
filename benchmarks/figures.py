"""Figures out of the ledger: which belong together, and their ratios."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.operations import operations

OURS = "hilora"
Figure = dict[str, Any]


class Ratio(NamedTuple):
    """The median over runs, and its range."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if self.value < 10 else 1 if self.value < 100 else 0
        text = f"{self.value:.{digits}f}"
        if self.high > self.low:
            text += f" ({self.low:.{digits}f}–{self.high:.{digits}f})"
        return text


class Comparison:
    """One operation at one shape, on one device: the figures of all rivals in each of several runs."""

    def __init__(self) -> None:
        self.by_rival: dict[str, dict[str, Figure]] = defaultdict(dict)

    def ratio(self, rival: str, to: str = OURS, of: str = "ms") -> Ratio | None:
        """Of two rivals in the same run."""
        ones, others = self.by_rival.get(rival, {}), self.by_rival.get(to, {})
        found = [figure[of] / others[run][of] for run, figure in ones.items() if run in others and others[run][of]]
        return Ratio(median(found), min(found), max(found)) if found else None

    def median(self, rival: str, of: str = "ms") -> float | None:
        found = [figure[of] for figure in self.by_rival.get(rival, {}).values() if figure[of] is not None]
        return median(found) if found else None


Key = tuple[str, str, Any]  # operation, phase, shape


class Device(NamedTuple):
    """What was measured on one device by the newest code there."""

    conditions: Figure  # a figure of the last run
    runs: int
    comparisons: dict[Key, Comparison]

    def of(self, operation: str, phase: str) -> dict[Any, Comparison]:
        """By shape."""
        return {shape: found for (op, ph, shape), found in self.comparisons.items() if (op, ph) == (operation, phase)}


def by_device(figures: Sequence[Figure]) -> list[Device]:
    """Devices in the order in which they were last measured, the newest first; without operations that are gone."""
    figures = [figure for figure in figures if figure["op"] in operations()]
    last = {figure["device"]: figure for figure in figures}
    found = []
    for device, newest in sorted(last.items(), key=lambda item: item[1]["run"], reverse=True):
        alike = [f for f in figures if f["device"] == device and _code(f) == _code(newest)]
        comparisons: dict[Key, Comparison] = defaultdict(Comparison)
        for figure in alike:
            shape = operations()[figure["op"]].shape
            key = figure["op"], figure["phase"], shape(**{name: figure[name] for name in shape._fields})
            comparisons[key].by_rival[figure["rival"]][figure["run"]] = figure
        found.append(Device(newest, len({figure["run"] for figure in alike}), dict(comparisons)))
    return found


def _code(figure: Figure) -> tuple[Any, ...]:
    return tuple(figure[name] for name in ("hilora", "torch", "triton", "peft", "scale"))
