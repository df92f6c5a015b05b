from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hilora.algorithms.aggregation import check_finite, product_space_mean, relative_change
from hilora.algorithms.clustering import cluster_clients
from hilora.errors import InvalidValueError
from tests.helpers import random

Shape = tuple[int, ...]


def make(
    clients: int, rank: int, inner: Shape = (), out: int = 9, in_: int = 7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random adapters A [N, ..., r, in] and B [N, ..., out, r] in fp64."""
    A = random(clients, *inner, rank, in_, seed=seed, dtype=torch.float64)
    return A, random(clients, *inner, out, rank, seed=seed + 100, dtype=torch.float64)


def dense(A: Tensor, B: Tensor, weights: Tensor, rank: int) -> Tensor:
    """The truncated SVD of the mean product, as a product."""
    share = (weights.double() / weights.sum()).view(-1, *[1] * (A.dim() - 1))
    U, sigma, Vh = torch.linalg.svd((share * (B.double() @ A.double())).sum(0), full_matrices=False)
    product: Tensor = (U[..., :rank] * sigma[..., None, :rank]) @ Vh[..., :rank, :]
    return product


@pytest.mark.parametrize("inner", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    ("clients", "rank", "new_rank"), [(5, 2, 2), (5, 2, 4), (3, 4, 1), (1, 3, 3), (2, 1, 1), (20, 5, 7)]
)
def test_the_mean_is_the_best_adapter_for_the_mean_product(
    inner: Shape, clients: int, rank: int, new_rank: int
) -> None:
    A, B = make(clients, rank, inner)
    weights = torch.arange(1, clients + 1)
    new_A, new_B = product_space_mean(A, B, weights, new_rank)
    assert new_A.shape == (*inner, new_rank, 7)
    assert new_B.shape == (*inner, 9, new_rank)
    torch.testing.assert_close(new_B @ new_A, dense(A, B, weights, new_rank), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        new_B.mT @ new_B, torch.eye(new_rank).double().expand(*inner, -1, -1), rtol=0, atol=1e-12
    )
    sizes = new_A.norm(dim=-1)
    assert (sizes.diff() <= 1e-12).all(), "A carries the singular values, from the largest"
    gram = new_A @ new_A.mT
    torch.testing.assert_close(gram, torch.diag_embed(sizes.square()), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("out", "in_"), [(9, 7), (7, 9), (40, 3)])
def test_a_single_client_keeps_its_product(out: int, in_: int) -> None:
    A, B = make(1, 3, (2,), out, in_)
    new_A, new_B = product_space_mean(A, B, torch.tensor([7]), 3)
    torch.testing.assert_close(new_B @ new_A, (B @ A)[0], rtol=0, atol=1e-10)


def test_products_are_averaged_not_factors() -> None:
    A, B = make(2, 2)
    A[1], B[1] = -A[0], -B[0]  # the same product
    new_A, new_B = product_space_mean(A, B, torch.ones(2), 2)
    torch.testing.assert_close(new_B @ new_A, B[0] @ A[0], rtol=0, atol=1e-10)


def test_the_order_of_the_clients_does_not_count() -> None:
    A, B = make(6, 3, (2,))
    weights = torch.tensor([1.0, 2, 3, 4, 5, 6])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for one, other in zip(
        product_space_mean(A, B, weights, 3), product_space_mean(A[order], B[order], weights[order], 3), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_basis_of_a_client_does_not_count() -> None:
    A, B = make(4, 3)
    mix = random(4, 3, 3, seed=5, dtype=torch.float64)
    one = product_space_mean(A, B, torch.ones(4), 3)
    other = product_space_mean(torch.linalg.solve(mix, A), B @ mix, torch.ones(4), 3)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weights", [torch.tensor([1, 2, 0, 5]), torch.tensor([10.0, 20.0, 0.0, 50.0]).half()])
def test_only_the_shares_of_the_weights_count(weights: Tensor) -> None:
    A, B = make(4, 2)
    expected = product_space_mean(A, B, torch.tensor([0.125, 0.25, 0, 0.625]), 2)
    for one, other in zip(product_space_mean(A, B, weights, 2), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    without = torch.tensor([0, 1, 3])
    for one, other in zip(product_space_mean(A[without], B[without], weights[without], 2), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_rank_beyond_what_there_is_leaves_zeros() -> None:
    A, B = make(2, 2)
    new_A, new_B = product_space_mean(A, B, torch.ones(2), 6)
    torch.testing.assert_close(new_B @ new_A, (B @ A).mean(0), rtol=0, atol=1e-10)
    assert not new_A[4:].any()
    assert not new_B[:, 4:].any()
    torch.testing.assert_close(new_B[:, :4].T @ new_B[:, :4], torch.eye(4).double(), rtol=0, atol=1e-12)


def test_updates_without_effect_stay_without_effect() -> None:
    A, B = make(3, 2)
    new_A, new_B = product_space_mean(A, torch.zeros_like(B), torch.ones(3), 2)
    assert not new_A.any()
    torch.testing.assert_close(new_B.T @ new_B, torch.eye(2).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_the_arithmetic_at_least_fp32(dtype: torch.dtype) -> None:
    A, B = (factor.to(dtype) for factor in make(5, 3, (2,)))
    new_A, new_B = product_space_mean(A, B, torch.ones(5), 3)
    assert new_A.dtype == new_B.dtype == dtype
    expected = dense(A, B, torch.ones(5), 3)
    assert (new_B.double() @ new_A.double() - expected).norm() < 16 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_updates_that_are_not_finite_name_their_clients(value: float) -> None:
    A, B = make(5, 2, (3,))
    A[1, 2, 0, 3], B[4, 0, 0, 0] = value, value
    with pytest.raises(ValueError, match=r"the updates of clients \[1, 4\] \(positions in the batch\) are not finite"):
        product_space_mean(A, B, torch.ones(5), 2)
    with pytest.raises(ValueError, match=r"clients \[4\]"):
        check_finite(torch.ones(5), B)
    check_finite(A[:1], B[:1])


@pytest.mark.parametrize(
    ("A", "B", "weights", "rank", "message"),
    [
        ((3, 2, 7), (4, 9, 2), [1, 1, 1], 2, r"A \(3, 2, 7\), B \(4, 9, 2\) and weights \(3,\) do not fit"),
        ((3, 2, 7), (3, 9, 1), [1, 1, 1], 2, "do not fit"),
        ((3, 2, 7), (3, 9, 2), [1, 1], 2, r"weights \(2,\) do not fit"),
        ((3, 4, 2, 7), (3, 5, 9, 2), [1, 1, 1], 2, "do not fit"),
        ((0, 2, 7), (0, 9, 2), [], 2, "weights must be finite, not negative and not all zero"),
        ((2, 2, 7), (2, 9, 2), [1, 1], 0, "rank must lie between 1 and 7, got 0"),
        ((2, 2, 7), (2, 9, 2), [1, 1], 8, "rank must lie between 1 and 7, got 8"),
        ((2, 2, 7), (2, 9, 2), [1, -1], 2, r"weights must be finite, not negative and not all zero, got \[1, -1\]"),
        ((2, 2, 7), (2, 9, 2), [0, 0], 2, r"got \[0, 0\]"),
        ((2, 2, 7), (2, 9, 2), [1, float("nan")], 2, "nan"),
        ((2, 2, 7), (2, 9, 2), [1, float("inf")], 2, "inf"),
    ],
)
def test_what_does_not_fit_is_an_error(A: Shape, B: Shape, weights: Sequence[float], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        product_space_mean(random(*A), random(*B), torch.tensor(weights), rank)


def dense_change(after: list[tuple[Tensor, Tensor]], before: list[tuple[Tensor, Tensor]]) -> float:
    """ρ from the products of all projections, laid end to end."""
    new = torch.cat([(B @ A).flatten() for A, B in after])
    old = torch.cat([(B @ A).flatten() for A, B in before])
    return float((new - old).norm() / old.norm())


def test_relative_change_is_that_of_the_products() -> None:
    for ranks in ((3, 3), (2, 4)):
        after = [make(5, ranks[0], seed=1), make(2, ranks[0], out=4, seed=2)]
        before = [make(5, ranks[1], seed=3), make(2, ranks[1], out=4, seed=4)]
        assert relative_change(after, before) == pytest.approx(dense_change(after, before), rel=1e-10)


def test_relative_change_is_small_for_a_small_change_and_zero_for_another_basis() -> None:
    A, B = make(5, 3)
    near = [(A, B + 1e-4 * random(5, 9, 3, seed=7, dtype=torch.float64))]
    assert relative_change(near, [(A, B)]) == pytest.approx(dense_change(near, [(A, B)]), rel=1e-6)
    turn = torch.linalg.qr(random(3, 3, seed=8, dtype=torch.float64))[0]
    assert relative_change([(turn.T @ A, B @ turn)], [(A, B)]) < 1e-7


def test_relative_change_from_nothing_is_large() -> None:
    A, B = make(5, 3)
    assert relative_change([(A, B)], [(A, torch.zeros_like(B))]) > 1e9
    assert relative_change([(A, 0 * B)], [(A, 0 * B)]) == 0


def test_whole_numbers_and_products_that_overflow_are_refused():
    A, B, weights = random(3, 2, 4, 8), random(3, 2, 8, 4), torch.ones(3)
    with pytest.raises(InvalidValueError, match=r"torch.int64, expected floating"):
        product_space_mean((9 * A).long(), (9 * B).long(), weights, 4)
    with pytest.raises(InvalidValueError, match=r"overflow torch.float32"):
        product_space_mean(1e30 * A, 1e30 * B, weights, 4)
    with pytest.raises(InvalidValueError, match=r"torch.int64, expected floating"):
        cluster_clients(torch.ones(3, 1, 4, 2, dtype=torch.long), 1, 2)
