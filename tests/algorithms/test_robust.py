"""Robust means against cases worked out by hand, plain references, and each other's invariances; in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from hilora.algorithms.robust import (
    clipping_scales,
    distances,
    geometric_median_weights,
    product_distances,
    trimmed_mean,
    trimmed_product_mean,
)
from hilora.errors import InvalidValueError
from tests.algorithms.test_aggregation import make
from tests.helpers import random

sizes = st.integers(1, 7)


def double(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed, dtype=torch.float64)


@given(clients=sizes, rank=st.integers(1, 4), out=sizes, in_=sizes, projections=st.integers(1, 3), seed=sizes)
@settings(max_examples=40, deadline=None)
def test_distances_of_products_are_those_of_the_products(
    clients: int, rank: int, out: int, in_: int, projections: int, seed: int
) -> None:
    factors = [make(clients, rank, (projections,), out, in_, seed), make(clients, rank, (), in_, out, seed + 1)]
    flat = torch.cat([(B @ A).flatten(1) for A, B in factors], 1)
    expected = (flat[:, None] - flat).square().sum(-1)
    torch.testing.assert_close(product_distances(factors), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(distances([B @ A for A, B in factors]), expected, rtol=1e-10, atol=1e-10)


def test_another_basis_is_no_distance() -> None:
    A, B = make(1, 3)
    mix = double(3, 3, seed=5)
    both = torch.cat([A, torch.linalg.solve(mix, A)]), torch.cat([B, B @ mix])
    assert product_distances([both]).max() < 1e-10


def test_what_has_no_distances_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match="no projections"):
        product_distances([])
    with pytest.raises(InvalidValueError, match=r"torch.int64, expected floating"):
        product_distances([(torch.ones(2, 1, 3).long(), torch.ones(2, 3, 1).long())])
    with pytest.raises(InvalidValueError, match=r"torch.int64, expected floating"):
        distances([torch.ones(2, 1).long()])


def test_clipping_scales_by_hand() -> None:
    norms = torch.tensor([0.0, 1.0, 4.0, 10.0]).double()
    assert clipping_scales(norms, 2.0).tolist() == [1, 1, 0.5, 0.2]
    assert clipping_scales(norms).tolist() == [1, 1, 2.5 / 4, 0.25]  # the median of four is 2.5
    assert clipping_scales(torch.zeros(3)).tolist() == [1, 1, 1]


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=9), far=st.floats(1, 1e12))
def test_no_clipped_norm_is_beyond_what_the_majority_has(values: list[float], far: float) -> None:
    norms = torch.tensor(values, dtype=torch.float64)
    attacked = norms.clone()
    attacked[: (len(values) - 1) // 2] += far  # fewer than half
    honest = attacked[(len(values) - 1) // 2 :]
    assert (attacked * clipping_scales(attacked)).max() <= honest.max() * (1 + 1e-12)


def cost(points: Tensor, at: Tensor) -> float:
    return float((points - at).norm(dim=1).sum())


def median_of(points: Tensor) -> Tensor:
    return geometric_median_weights(distances([points])) @ points


def test_geometric_medians_by_hand() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [50.0], [1e6]]).double()
    torch.testing.assert_close(median_of(line), torch.tensor([2.0]).double(), rtol=0, atol=1e-4)
    triangle = torch.tensor([[0.0, 0], [1, 0], [0.5, 3**0.5 / 2]]).double()  # its centre
    torch.testing.assert_close(median_of(triangle), triangle.mean(0), rtol=0, atol=1e-8)
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 5], [0, -5]]).double()  # where the diagonals cross
    torch.testing.assert_close(median_of(square), torch.zeros(2).double(), rtol=0, atol=1e-6)
    wide = torch.tensor([[0.0, 0], [1, 0], [-0.5, 0.1]]).double()  # an angle of 120 degrees or more is the median
    torch.testing.assert_close(median_of(wide), wide[0], rtol=0, atol=1e-4)


def test_geometric_medians_of_few_and_of_equal_points() -> None:
    assert geometric_median_weights(torch.zeros(1, 1)).tolist() == [1]
    assert geometric_median_weights(torch.tensor([[0.0, 9.0], [9.0, 0.0]])).tolist() == [0.5, 0.5]
    torch.testing.assert_close(geometric_median_weights(torch.zeros(4, 4)), torch.full((4,), 0.25).double())
    points = torch.tensor([[3.0], [3.0], [3.0], [1e9]]).double()
    assert float(median_of(points)) == pytest.approx(3)


@given(clients=st.integers(3, 9), width=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_no_point_has_a_smaller_sum_of_distances(clients: int, width: int, seed: int) -> None:
    points = double(clients, width, seed=seed)
    weights = geometric_median_weights(distances([points]))
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1)
    found = cost(points, weights @ points)
    best = minimize(lambda at: cost(points, torch.from_numpy(at)), np.zeros(width), method="Nelder-Mead", tol=1e-10)
    assert found <= min(best.fun, *(cost(points, point) for point in points)) * (1 + 1e-5)


@given(honest=st.integers(2, 8), seed=st.integers(0, 100), far=st.floats(1, 1e12))
@settings(max_examples=40, deadline=None)
def test_a_minority_cannot_take_the_geometric_median_away(honest: int, seed: int, far: float) -> None:
    """By less than the bound of the theory: the largest honest distance times 2 (n - f) / (n - 2 f)."""
    attackers = honest - 1
    points = torch.cat([double(honest, 4, seed=seed), far + double(attackers, 4, seed=seed + 1)])
    centre = points[:honest].mean(0)
    radius = float((points[:honest] - centre).norm(dim=1).max())
    assert float((median_of(points) - centre).norm()) <= 2 * honest / (honest - attackers) * radius * (1 + 1e-4)


def test_trimmed_means_by_hand() -> None:
    values = torch.tensor([[1.0, -9], [2, 5], [3, 5], [4, 6], [99, 8]])
    assert trimmed_mean(values, 0.0).tolist() == pytest.approx(values.mean(0).tolist())
    assert trimmed_mean(values, 0.2).tolist() == pytest.approx([3, 16 / 3])  # one at either end
    assert trimmed_mean(values, 0.21).tolist() == [3, 5]  # two
    assert trimmed_mean(values[:4], 0.49).tolist() == [2.5, 5]  # the median of an even number
    assert trimmed_mean(values[:2], 0.4).tolist() == [1.5, -2]  # of two none can go
    assert trimmed_mean(values[:1], 0.4).tolist() == [1, -9]
    assert trimmed_mean(torch.tensor([1.0, float("nan"), 2, 3, -1e30]), 0.2).item() == 2
    assert trimmed_mean(torch.ones(30, 2), 0.1).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    values = random(7, 3, 5).to(dtype)
    found = trimmed_mean(values, 0.2)
    assert found.dtype == dtype
    torch.testing.assert_close(found, trimmed_mean(values.double(), 0.2).to(dtype))


def test_what_cannot_be_trimmed_is_an_error() -> None:
    for trim in (-0.1, 0.5, 1.0):
        with pytest.raises(InvalidValueError, match=f"trim={trim} of 3 clients"):
            trimmed_mean(torch.ones(3), trim)
    with pytest.raises(InvalidValueError, match="of 0 clients"):
        trimmed_mean(torch.ones(0, 2), 0.1)
    with pytest.raises(InvalidValueError, match=r"torch.int64, expected floating"):
        trimmed_mean(torch.ones(3).long(), 0.1)


@given(clients=st.integers(1, 9), trim=st.floats(0, 0.49), seed=sizes, factor=st.floats(1.5, 100))
@settings(max_examples=40, deadline=None)
def test_a_trimmed_mean_lies_among_the_values_and_moves_with_them(
    clients: int, trim: float, seed: int, factor: float
) -> None:
    values = double(clients, 3, seed=seed)
    found = trimmed_mean(values, trim)
    assert ((found >= values.min(0).values - 1e-12) & (found <= values.max(0).values + 1e-12)).all()
    torch.testing.assert_close(trimmed_mean(factor * values + 1, trim), factor * found + 1)
    torch.testing.assert_close(trimmed_mean(values.flip(0), trim), found)


@pytest.mark.parametrize("inner", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("out", "in_", "rank"), [(9, 7, 2), (5, 11, 4), (4, 4, 4)])
def test_the_trimmed_mean_of_products_is_the_best_adapter_for_it(
    inner: tuple[int, ...], out: int, in_: int, rank: int
) -> None:
    A, B = make(6, 2, inner, out, in_)
    new_A, new_B = trimmed_product_mean(A, B, 0.2, rank)
    assert new_A.shape == (*inner, rank, in_)
    assert new_B.shape == (*inner, out, rank)
    U, sigma, Vh = torch.linalg.svd((B @ A).sort(0).values[2:4].mean(0), full_matrices=False)
    best = U[..., :rank] * sigma[..., None, :rank] @ Vh[..., :rank, :]
    torch.testing.assert_close(new_B @ new_A, best, rtol=0, atol=1e-10)
    torch.testing.assert_close(new_B.mT @ new_B, torch.eye(rank).double().expand(*inner, -1, -1), rtol=0, atol=1e-10)


def test_a_trimmed_mean_of_products_forgets_who_is_far_away() -> None:
    A, B = make(5, 2)
    A[1:], B[1:] = A[:1], B[:1]
    A[4] *= -1e15
    new_A, new_B = trimmed_product_mean(A, B, 0.2, 2)
    torch.testing.assert_close(new_B @ new_A, B[0] @ A[0], rtol=0, atol=1e-10)
