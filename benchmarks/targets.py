"""Targets, and what the last run on a device says of them: `python -m benchmarks.targets`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.figures import OURS, Comparison, by_device
from benchmarks.ledger import RESULTS, read
from benchmarks.operations import left_out, operations
from benchmarks.timing import DEVICE, SCALES
from hilora.reporting.machine import device_name

WHOLE = "hilora, whole qkv"


class Target(NamedTuple):
    """That one rival takes at most so many times what another takes, at the shape in the middle of an operation."""

    what: str
    operation: str
    phase: str
    of: str
    to: str
    at_most: float


TARGETS = {
    "cuda": (
        Target("layer, forward, over the frozen layer", "layer", "forward", OURS, "frozen layer", 1.20),
        Target("layer, step, over the frozen layer", "layer", "step", OURS, "frozen layer", 1.30),
        Target("layer, forward, over stacked addmm", "layer", "forward", OURS, "stacked addmm", 1.0),
        Target("layer, step, over stacked addmm", "layer", "step", OURS, "stacked addmm", 1.0),
        Target("layer, step, over compiled PEFT", "layer", "step", OURS, "PEFT, compiled", 1.0),
        Target("unequal ranks, over equal ones", "unequal", "step", OURS, "equal ranks", 1.10),
        Target("some blocks trained, over all", "unequal", "step", "some blocks trained", "equal ranks", 1.10),
        Target("some blocks alone, over all", "unequal", "step", "some blocks alone", "equal ranks", 1.10),
    ),
    "cpu": (
        Target("layer, forward, over stacked addmm", "layer", "forward", WHOLE, "stacked addmm", 1.0),
        Target("layer, step, over stacked addmm", "layer", "step", WHOLE, "stacked addmm", 1.0),
        Target("unequal ranks, over equal ones", "unequal", "step", OURS, "equal ranks", 1.10),
        Target("some blocks trained, over all", "unequal", "step", "some blocks trained", "equal ranks", 1.10),
        Target("some blocks alone, over all", "unequal", "step", "some blocks alone", "equal ranks", 1.10),
    ),
}
TARGETS["toy"] = TARGETS["cuda"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default=DEVICE)
    parser.add_argument("--figures", type=Path, default=RESULTS, help="the ledger")
    given = parser.parse_args(arguments)
    name = device_name(torch.device(DEVICE))
    figures = read(given.figures) if given.figures.exists() else []
    found = next((d for d in by_device(figures) if d.conditions["device"] == name), None)
    print(f"{'target':44} {'at most':>8} {'measured':>16}")
    for target in TARGETS[given.scale]:
        operation = operations().get(target.operation)
        if operation is None:
            result = f"{'not measured':>16}, since {left_out()[target.operation]} is not installed"
        else:
            shape = operation.shapes(given.scale)[0]
            result = said(target, found.of(target.operation, target.phase).get(shape) if found else None)
        print(f"{target.what:44} {target.at_most:8.2f} {result}")


def said(target: Target, compared: Comparison | None) -> str:
    """The ratio, and whether it meets the target."""
    ratio = compared.ratio(target.of, target.to) if compared else None
    if ratio is None:
        return f"{'not measured':>16}"
    return f"{ratio!s:>16}  {'met' if ratio.value <= target.at_most else 'MISSED'}"


if __name__ == "__main__":
    main()
