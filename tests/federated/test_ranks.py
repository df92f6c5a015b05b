"""How many ranks hold a share of an adapter's energy."""

from __future__ import annotations

import pytest
import torch

from hilora.adapters.table import AdapterTable
from hilora.federated.ranks import by_size, compressed, energy_ranks


def table(singular: list[list[float]]) -> AdapterTable:
    """An adapter for each row, in any basis, whose two projections have these singular values."""
    generator = torch.Generator().manual_seed(0)
    A: list[torch.Tensor] = []
    B: list[torch.Tensor] = []
    for values in singular:
        for found, shape in ((A, (2, 7, 4)), (B, (2, 9, 4))):
            Q = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
            found.append(Q if found is B else Q * torch.tensor(values, dtype=torch.float64))
        turn = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        A[-1], B[-1] = turn @ A[-1].mT, B[-1] @ turn.inverse()
    return AdapterTable([torch.stack(A)], [torch.stack(B)])


@pytest.mark.parametrize(("share", "expected"), [(0.5, [1, 2]), (0.64, [1, 3]), (0.93, [3, 4]), (1.0, [3, 4])])
def test_the_fewest_that_hold_it(share: float, expected: list[int]) -> None:
    found = table([[1, 3, 2, 0], [1, 1, 1, 1]])  # 9, 13 and 14 of 14; quarters
    assert energy_ranks(found, share).tolist() == expected


def test_an_adapter_without_effect_needs_one() -> None:
    nothing = AdapterTable([torch.randn(2, 3, 4, 5)], [torch.zeros(2, 3, 6, 4)])
    assert energy_ranks(nothing, 0.9).tolist() == [1, 1]


def test_what_is_left_is_the_best_product_of_so_many_ranks() -> None:
    whole = table([[1, 3, 2, 0.5], [4, 1, 1, 1]])
    product = whole.B[0] @ whole.A[0]
    ordered = by_size(whole)
    torch.testing.assert_close(ordered.B[0] @ ordered.A[0], product)
    less = compressed(whole, 0.8)
    assert less.rank.tolist() == [2, 1]
    U, sigma, Vh = torch.linalg.svd(product, full_matrices=False)
    for one, rank in enumerate((2, 1)):
        best = U[one, ..., :rank] * sigma[one, :, None, :rank] @ Vh[one, :, :rank]
        torch.testing.assert_close(less.B[0][one] @ less.A[0][one], best)
