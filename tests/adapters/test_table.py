"""The one container of adapters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError
from tests.helpers import random, same


def make(slots: int = 3, r: int = 4, rank: list[int] | None = None, seed: int = 0) -> AdapterTable:
    """Adapters of two shapes of projections, zero beyond their ranks."""
    ranks = torch.tensor(rank if rank is not None else [r] * slots)
    beyond = torch.arange(r) >= ranks[:, None]  # [S, r]
    A = [random(slots, p, r, n, seed=seed + p).masked_fill(beyond[:, None, :, None], 0) for p, n in ((2, 7), (1, 5))]
    B = [random(slots, p, m, r, seed=9 + p).masked_fill(beyond[:, None, None], 0) for p, m in ((2, 6), (1, 8))]
    return AdapterTable(A, B, ranks)


def products(table: AdapterTable) -> list[Tensor]:
    return [B @ A for A, B in table.factors]


def test_a_table_has_rows_with_ranks() -> None:
    table = make(rank=[4, 1, 2])
    assert len(table) == 3
    assert table.r == 4
    assert [(tuple(A.shape), tuple(B.shape)) for A, B in table.factors] == [
        ((3, 2, 4, 7), (3, 2, 6, 4)),
        ((3, 1, 4, 5), (3, 1, 8, 4)),
    ]
    assert AdapterTable(table.A, table.B).rank.tolist() == [4, 4, 4]
    assert AdapterTable(table.A, ()).r == AdapterTable((), table.B).r == 4


@pytest.mark.parametrize(
    ("A", "B", "rank", "message"),
    [
        ([], [], None, "needs A or B"),
        ([torch.zeros(2, 4, 7)], [], None, r"A \(2, 4, 7\) does not fit: expected \[2, P, 4, in\]"),
        ([torch.zeros(2, 1, 4, 7)], [torch.zeros(2, 1, 6, 3)], None, r"B .* expected \[2, P, out, 4\]"),
        ([torch.zeros(2, 1, 4, 7)], [torch.zeros(3, 1, 6, 4)], None, r"B .* expected \[2, P, out, 4\]"),
        ([torch.zeros(2, 1, 4, 7)], [torch.zeros(2, 2, 6, 4)], None, "different projections"),
        ([torch.zeros(2, 1, 4, 7)], [], torch.tensor([4]), r"rank \[4\] does not fit: expected 2 of at most 4"),
        ([torch.zeros(2, 1, 4, 7)], [], torch.tensor([4, 5]), r"rank \[4, 5\] does not fit"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    A: list[Tensor], B: list[Tensor], rank: Tensor | None, message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        AdapterTable(A, B, rank)


def test_rows_are_copies_and_can_be_put_back() -> None:
    table = make(rank=[4, 1, 2])
    picked = table.rows(torch.tensor([2, 0]))
    assert picked.rank.tolist() == [2, 4]
    assert torch.equal(picked.A[0], table.A[0][[2, 0]])
    picked.A[0].zero_()
    assert table.A[0][2].any()
    assert table.rows(torch.tensor([False, True, False])).rank.tolist() == [1]
    other = make(slots=2, rank=[3, 3], seed=50)
    table.put(torch.tensor([0, 2]), other)
    assert table.rank.tolist() == [3, 1, 3]
    assert torch.equal(table.B[1][[0, 2]], other.B[1])


def test_putting_a_factor_leaves_the_other() -> None:
    table, before = make(), make()
    other = make(slots=1, seed=50)
    table.put(torch.tensor([1]), other.only("A"))
    assert torch.equal(table.A[0][1:2], other.A[0])
    assert same([*table.B], [*before.B])


def test_factors_travel_alone_and_join_again() -> None:
    table, other = make(), make(seed=50)
    joined = table.only("B").joined(other.only("A"))
    assert same([*joined.A, *joined.B], [*other.A, *table.B])


def test_where_and_repeated_and_mean() -> None:
    table, other = make(rank=[4, 4, 4]), make(rank=[1, 1, 1], seed=50)
    mixed = table.where(torch.tensor([True, False, True]), other)
    assert mixed.rank.tolist() == [4, 1, 4]
    assert torch.equal(mixed.A[0][1], other.A[0][1])
    mean = other.mean(torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(mean.A[1][0], 0.25 * other.A[1][0] + 0.75 * other.A[1][1])
    assert mean.rank.tolist() == [1]
    again = mean.repeated(3)
    assert len(again) == 3
    again.A[0][0].zero_()
    assert again.A[0][1].any()


def test_traffic_is_what_the_ranks_weigh() -> None:
    table = make(rank=[4, 1, 0])
    row = 4 * (2 * 7 + 1 * 5 + 2 * 6 + 1 * 8)
    assert table.nbytes().tolist() == [4 * row, row, 0]
    assert table.only("A").nbytes().tolist() == [16 * (2 * 7 + 5), 4 * (2 * 7 + 5), 0]


def test_what_is_not_finite_is_told_by_row() -> None:
    table = make()
    table.B[1][2, 0, 3, 1] = torch.nan
    assert table.finite().tolist() == [True, True, False]


def test_tensors_name_what_there_is_and_make_it_again() -> None:
    table = make(rank=[4, 1, 2])
    tensors = table.tensors()
    assert list(tensors) == ["0.lora_A", "1.lora_A", "0.lora_B", "1.lora_B", "rank"]
    assert same(AdapterTable.of(tensors).tensors(), tensors)


def test_a_mean_counts_each_adapter_with_its_scale() -> None:
    table = make(slots=2).scaled(torch.tensor([2.0, -3.0]))
    mean = table.mean(torch.tensor([1.0, 3.0]))
    assert mean.scale is None
    torch.testing.assert_close(mean.B[1][0], 0.5 * table.B[1][0] - 2.25 * table.B[1][1])
    torch.testing.assert_close(mean.A[1][0], 0.25 * table.A[1][0] + 0.75 * table.A[1][1])
    with pytest.raises(InvalidValueError, match="need their B"):
        table.only("A").mean(torch.ones(2))


def test_a_table_can_have_more_room_or_less_and_means_the_same() -> None:
    table = make(rank=[2, 1, 2])
    for r in (2, 4, 7):
        other = table.resized(r)
        assert other.r == r
        assert other.rank.tolist() == [2, 1, 2]
        for got, want in zip(products(other), products(table), strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(InvalidValueError, match="adapters of rank 2 have no room in rank 1"):
        table.resized(1)
    assert make(slots=0).resized(1).r == 1


def test_leading_ranks_and_some_projections_weigh_less() -> None:
    table = make(slots=2)
    few = table.leading(torch.tensor([4, 1]))
    assert few.rank.tolist() == [4, 1]
    assert not few.A[0][1, :, 1:].any()
    assert not few.B[1][1, ..., 1:].any()
    assert torch.equal(few.A[0][0], table.A[0][0])
    has = [torch.tensor([[True, False], [False, False]]), torch.tensor([[True], [True]])]
    some = few.having(has)
    wide, narrow = 4 * (7 + 6), 4 * (5 + 8)  # bytes of a rank
    assert some.nbytes().tolist() == [4 * (wide + narrow), narrow]
    assert not some.A[0][0, 1].any()
    assert not some.B[0][1].any()
    kept = [some.rows(torch.tensor([0, 1])), AdapterTable.of(some.tensors()), some.each(torch.clone), some.resized(6)]
    assert all([one.tolist() for one in table.has] == [one.tolist() for one in has] for table in kept)
    assert some.only("A").nbytes().tolist() == [4 * 4 * (7 + 5), 4 * 5]
    with pytest.raises(InvalidValueError, match=r"has \[\[2, 2\]\] does not fit: expected \[\[2, 2\], \[2, 1\]\]"):
        AdapterTable(table.A, table.B, table.rank, has[:1])


def test_scales_go_with_their_rows_and_can_be_put_into_B() -> None:
    plain, scale = make(rank=[4, 1, 2]), torch.tensor([0.5, 1.0, -2.0])
    table = AdapterTable(plain.A, plain.B, plain.rank, scale=scale)
    for other in (AdapterTable.of(table.tensors()), table.each(torch.clone), table.resized(6), table.only("A")):
        assert other.scale is not None
        assert torch.equal(other.scale, scale)
    some = table.rows(torch.tensor([2, 0]))
    assert some.scale is not None
    assert some.scale.tolist() == [-2.0, 0.5]
    assert table.nbytes().tolist() == plain.nbytes().tolist()
    folded = table.with_scale_in_B()
    assert folded.scale is None
    for got, want in zip(products(folded), products(plain), strict=True):
        torch.testing.assert_close(got, scale[:, None, None, None] * want)
    assert plain.with_scale_in_B() is plain
    for wrong in (torch.ones(2), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(InvalidValueError, match=r"scale .* does not fit: expected fp32 \[3\]"):
            AdapterTable(plain.A, plain.B, scale=wrong)


def test_rows_with_and_without_scales_go_together() -> None:
    plain, scale = make(), torch.tensor([2.0, 3.0, 4.0])
    table, index = plain.scaled(scale.clone()), torch.tensor([1])
    for mask, one, other in ((True, table, plain), (False, plain, table)):
        both = one.where(torch.tensor([mask, not mask, mask]), other)
        assert both.scale is not None
        assert both.scale.tolist() == [2.0, 1.0, 4.0]
    table.put(index, plain.rows(index))
    assert table.scale is not None
    assert table.scale.tolist() == [2.0, 1.0, 4.0]
    with pytest.raises(InvalidValueError, match="without scales has no place"):
        plain.put(index, table.rows(index))
    assert plain.scaled(torch.tensor([1.0, torch.nan, torch.inf])).finite().tolist() == [True, False, False]
    with pytest.raises(InvalidValueError, match="need their B"):
        table.only("A").with_scale_in_B()
