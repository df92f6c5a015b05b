"""Accuracies over clients, and what runs of several seeds say together: spreads over seeds, intervals over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev, variance
from typing import NamedTuple

from torch import Tensor

CONFIDENCE = 0.95
BySeed = Mapping[int, Mapping[int, float]]
"""A value of each client, by seed and then by the client's id."""


class Spread(NamedTuple):
    """The mean over seeds and the sample standard deviation over them, None where there is one seed."""

    mean: float
    std: float | None


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval, whose ends are None where a seed has less than two clients."""

    mean: float
    low: float | None
    high: float | None


def summarise(accuracies: Tensor) -> dict[str, float | None]:
    """Mean, tail and spread of personalised accuracy.

    Args:
        accuracies: `[n]`, one fraction of 1 for each client; NaN for a client without test images, which is left out.

    Returns:
        `mean` over the clients; `tail`, the mean of the worst tenth of them (rounded up, so at least one client);
        `std`, the population standard deviation over clients. All None where no client has test images.
    """
    values = accuracies.detach().double().flatten().cpu()
    values = values[~values.isnan()].sort().values
    if not len(values):
        return {"mean": None, "tail": None, "std": None}
    worst = -(-len(values) // 10)  # the ceiling in integers: 0.1 * 30 is above 3 in floats
    return {
        "mean": values.mean().item(),
        "tail": values[:worst].mean().item(),
        "std": values.std(correction=0).item(),
    }


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and spread over seeds; None where no seed has a value."""
    known = [value for value in values if value is not None]
    return Spread(mean(known), stdev(known) if len(known) > 1 else None) if known else None


def interval(samples: Sequence[Sequence[float]]) -> Interval | None:
    """The mean over seeds of the mean over clients, with Student's interval over clients within seeds.

    Each seed has clients and a training of its own, so it is a stratum: its mean has the variance `s² / n` of its n
    clients. The mean of S seeds has the sum of these over S², and Welch and Satterthwaite's degrees of freedom. The
    interval says how far other clients of these trainings could move the mean; not what other seeds would.

    Args:
        samples: the clients' values, a sequence for each seed; empty ones are left out.

    Returns:
        None where there is no value at all.
    """
    from scipy.stats import t as student

    samples = [values for values in samples if values]
    if not samples:
        return None
    centre = mean(mean(values) for values in samples)
    if any(len(values) < 2 for values in samples):
        return Interval(centre, None, None)
    parts = [(variance(values) / len(values), len(values) - 1) for values in samples]
    total = sum(part for part, _ in parts)
    if total == 0:
        return Interval(centre, centre, centre)
    freedom = total**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total) / len(samples)
    return Interval(centre, centre - half, centre + half)


def differences(ours: BySeed, theirs: BySeed) -> dict[int, list[float]]:
    """`ours` less `theirs` for every client that both have, by seed; a client is the same in its seed alone."""
    return {
        seed: [clients[name] - theirs[seed][name] for name in clients if name in theirs[seed]]
        for seed, clients in ours.items()
        if seed in theirs
    }
