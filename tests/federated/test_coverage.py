"""Means of what clients cover in part, by hand."""

from __future__ import annotations

import torch

from hilora.adapters.table import AdapterTable
from hilora.federated.coverage import covered_mean, filled, picked, scattered


def row(value: float, r: int = 2) -> AdapterTable:
    return AdapterTable([torch.full((1, 2, r, 3), value)], [torch.full((1, 2, 4, r), -value)])


def three() -> AdapterTable:
    """Clients with 1, 2 and 4 everywhere; ranks 2, 1 and 2; the last one lacks the first projection."""
    A = torch.tensor([1.0, 2, 4]).view(3, 1, 1, 1).expand(3, 2, 2, 3)
    B = -torch.tensor([1.0, 2, 4]).view(3, 1, 1, 1).expand(3, 2, 4, 2)
    table = AdapterTable([A], [B], torch.tensor([2, 2, 2])).leading(torch.tensor([2, 1, 2]))
    return table.having([torch.tensor([[True, True], [True, True], [False, True]])])


def test_an_entry_is_the_mean_of_those_that_have_it() -> None:
    found = covered_mean(three(), torch.tensor([1.0, 3, 4]), row(9.0))
    # projection 0: rank 0 of clients 0 and 1, (1 + 3·2)/4; rank 1 of client 0 alone. Projection 1: 0, 1, 2 and 0, 2.
    expected = torch.tensor([[7 / 4, 1], [(1 + 6 + 16) / 8, (1 + 16) / 5]])
    torch.testing.assert_close(found.A[0][0], expected[..., None].expand(2, 2, 3))
    torch.testing.assert_close(found.B[0][0], -expected[:, None].expand(2, 4, 2))
    assert found.rank.tolist() == [2]


def test_where_nobody_is_what_was_before_stays() -> None:
    found = covered_mean(three().rows(torch.tensor([1])), torch.tensor([5]), row(9.0))
    assert found.A[0][0, :, 0].eq(2).all()
    assert found.A[0][0, :, 1].eq(9).all()
    assert found.B[0][0, ..., 1].eq(-9).all()
    nobody = covered_mean(three().rows(torch.tensor([2])), torch.tensor([0]), row(9.0))
    assert nobody.A[0].eq(9).all()


def test_filled_with_what_was_before_all_clients_count() -> None:
    whole = filled(three(), row(9.0))
    assert whole.has == ()
    assert whole.rank.tolist() == [2, 2, 2]
    assert whole.A[0][:, :, :, 0].tolist() == [[[1, 1], [1, 1]], [[2, 9], [2, 9]], [[9, 9], [4, 4]]]
    assert whole.B[0][:, :, 0].tolist() == [[[-1, -1], [-1, -1]], [[-2, -9], [-2, -9]], [[-9, -9], [-4, -4]]]


def test_full_coverage_is_the_plain_mean() -> None:
    torch.manual_seed(0)
    table = AdapterTable([torch.randn(4, 2, 2, 3).double()], [torch.randn(4, 2, 4, 2).double()])
    weights = torch.tensor([1, 2, 3, 4])
    found, plain = covered_mean(table, weights, row(0.0)), table.mean(weights)
    torch.testing.assert_close(found.A[0], plain.A[0])
    torch.testing.assert_close(found.B[0], plain.B[0])


def test_picked_ranks_go_back_where_they_were() -> None:
    torch.manual_seed(0)
    before = AdapterTable([torch.randn(1, 2, 4, 3)], [torch.randn(1, 2, 5, 4)])
    places, ranks = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2], [3, 2, 1, 0]]), torch.tensor([1, 2, 4])
    found = picked(before, places, ranks)
    assert found.rank.tolist() == [1, 2, 4]
    assert torch.equal(found.A[0][1, :, 0], before.A[0][0, :, 1])
    assert torch.equal(found.B[0][1, ..., 1], before.B[0][0, ..., 3])
    assert not found.A[0][1, :, 2:].any()
    whole = scattered(found, places, before)
    assert torch.equal(whole.A[0], before.A[0].expand(3, -1, -1, -1))
    assert torch.equal(whole.B[0], before.B[0].expand(3, -1, -1, -1))
    moved = scattered(found.each(lambda value: value + 1).leading(ranks), places, before)
    changed = (moved.A[0] - before.A[0])[:, 0, :, 0].round()
    assert changed.tolist() == [[0, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]]
    assert torch.equal((moved.B[0] - before.B[0])[:, 0, 0].round(), changed)
