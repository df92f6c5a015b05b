"""Means and intervals against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from hilora.reporting.statistics import Spread, differences, interval, spread, summarise


@pytest.mark.parametrize(("n", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (25, 3), (30, 3), (100, 10)])
def test_tail_is_the_mean_of_the_worst_tenth_rounded_up(n: int, worst: int) -> None:
    values = torch.linspace(0, 1, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    expected = values.sort().values[:worst].double().mean().item()
    assert summarise(values)["tail"] == pytest.approx(expected, abs=1e-7)


def test_mean_and_population_std() -> None:
    found = summarise(torch.tensor([0.2, 0.4, 0.9]))
    assert found["mean"] == pytest.approx(0.5)
    assert found["std"] == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 3))
    assert all(type(value) is float for value in found.values())


def test_one_client_has_no_spread() -> None:
    assert summarise(torch.tensor([0.25])) == {"mean": 0.25, "tail": 0.25, "std": 0.0}


def test_clients_without_test_images_are_left_out() -> None:
    nan = float("nan")
    assert summarise(torch.tensor([nan, 0.5, nan, 1.0])) == {"mean": 0.75, "tail": 0.5, "std": 0.25}


@pytest.mark.parametrize("values", [[], [float("nan")] * 3])
def test_nobody_has_test_images(values: list[float]) -> None:
    assert summarise(torch.tensor(values)) == {"mean": None, "tail": None, "std": None}


def test_spread_over_seeds() -> None:
    assert spread([1.0, None, 3.0]) == Spread(2.0, math.sqrt(2))
    assert spread([1.0]) == Spread(1.0, None)
    assert spread([None]) is None


def test_one_seed_is_students_interval_over_clients() -> None:
    # mean 2, s² = 1, n = 3: 2 ± 4.302653 / √3
    found = interval([[1.0, 2.0, 3.0]])
    assert found is not None
    assert found == pytest.approx((2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)
    reference = stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))


def test_seeds_are_strata_of_equal_weight() -> None:
    # Means 2 and 12; variances of the means 1/3 and 2/4, together 5/6; the standard error is √(5/6) / 2.
    # Degrees of freedom: (5/6)² / ((1/3)² / 2 + (1/2)² / 3) = 0.694444 / 0.138889 = 5, where t is 2.570582.
    samples = [[1.0, 2.0, 3.0], [10.0, 12.0, 13.0, 13.0]]
    half = 2.570582 * math.sqrt(5 / 6) / 2
    assert interval(samples) == pytest.approx((7.0, 7 - half, 7 + half), abs=1e-6)


def test_no_interval_where_a_seed_has_one_client_and_none_at_all_without_any() -> None:
    assert interval([[1.0], [2.0, 4.0]]) == (2.0, None, None)
    assert interval([[], [2.0, 2.0]]) == (2.0, 2.0, 2.0)
    assert interval([[]]) is None


def test_clients_are_paired_by_seed_and_id() -> None:
    ours = {0: {3: 0.5, 4: 0.75}, 1: {3: 0.25}, 2: {0: 1.0}}
    theirs = {0: {4: 0.25, 3: 0.5, 5: 0.9}, 1: {3: 0.5}}
    assert differences(ours, theirs) == {0: [0.0, 0.5], 1: [-0.25]}
