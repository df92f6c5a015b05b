"""Budgets of ranks, layers and bytes: how they are read, and who gets them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.budgets import Budgets, budgets
from hilora.federated.data.partitions import Client, Population
from hilora.federated.settings import TrainingSettings, number_of_bytes, shares
from hilora.federated.strategies import STRATEGIES
from tests.federated.conftest import Simulate

KEEP = dict.fromkeys(("hilora", "flexlora", "hetlora", "fslora", "flora", "sdflora"), ("ranks",))
KEEP |= dict.fromkeys(("fed-hello", "fedra"), ("layers",))


def population(sizes: list[int], groups: list[int] | None = None, unseen: int = 0) -> Population:
    """Clients with so many images; the last ones are unseen."""
    nothing = torch.empty(0, dtype=torch.int64)
    clients = tuple(
        Client(torch.arange(size), nothing, nothing, groups[i] if groups else None, i < len(sizes) - unseen)
        for i, size in enumerate(sizes)
    )
    return Population(clients, "by hand", tuple(f"group {one}" for one in sorted(set(groups or ()))))


def ranks(found: Budgets) -> Tensor:
    assert found.ranks is not None
    return found.ranks


def test_budgets_are_read_as_fractions_and_as_one_for_all() -> None:
    third = Fraction(1, 3)
    assert shares("1/3:12,1/3:9, 1/3:6") == [(third, 12), (third, 9), (third, 6)]
    assert shares("0.5:16,0.5:4") == [(Fraction(1, 2), 16), (Fraction(1, 2), 4)]
    assert shares("8") == [(Fraction(1), 8)]
    assert TrainingSettings(rank_budgets=8, layer_budgets=2) == TrainingSettings(rank_budgets="8", layer_budgets="2")


@pytest.mark.parametrize("value", [0, True, 8.0, [8]])
def test_of_numbers_whole_ones_above_zero_are_budgets(value: object) -> None:
    with pytest.raises(InvalidValueError, match=r"rank_budgets=|budgets at least 1"):
        TrainingSettings(rank_budgets=value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no budget of a share: expected some, as in 1/3:12"),
        ("1/3:12,", "'' is no budget"),
        ("half:4", "'half:4' is no budget"),
        ("1/0:4", "'1/0:4' is no budget"),
        ("1/2:4,1/3:2", "the shares add up to 5/6, expected 1"),
        ("1/2:0,1/2:3", "budgets must be at least|shares must be above 0, and budgets at least 1"),
        ("-1/2:4,3/2:3", "shares must be above 0"),
    ],
)
def test_what_is_no_budget_is_said(text: str, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        TrainingSettings(rank_budgets=text)


@pytest.mark.parametrize(
    ("text", "bytes"), [("7", 7), (" 12 B ", 12), ("1.5kB", 1500), ("0.25 MB", 250_000), ("2GB", 2 * 10**9)]
)
def test_numbers_of_bytes_have_units(text: str, bytes: int) -> None:
    assert number_of_bytes(text) == bytes


@pytest.mark.parametrize("text", ["", "kB", "-1", "1e3", "1 KiB", "1 kB more", "nan"])
def test_what_is_no_number_of_bytes_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of bytes"):
        number_of_bytes(text)
    with pytest.raises(InvalidValueError, match=r"byte_budgets=.*is no budget of a share.*1.5MB.*kB, MB or GB"):
        TrainingSettings(byte_budgets=text)


@pytest.mark.parametrize(("name", "kinds"), KEEP.items())
def test_a_budget_of_bytes_is_the_most_of_what_the_method_keeps(
    simulate: Simulate, name: str, kinds: tuple[str], tmp_path: Path
) -> None:
    """Of two ranks in two blocks, a rank of both blocks and both ranks of a block take 768 bytes."""
    (kind,) = kinds
    options = {"rounds": [1, 0, 0], "rank": 2, "unseen": 0}
    plain = simulate(name, **{f"{kind[:-1]}_budgets": "1/2:2,1/2:1"}, **options)
    told = simulate(name, byte_budgets="1/2:1 MB,1/2:1535", out=tmp_path / "bytes", **options)
    assert getattr(told.budgets, kind).tolist() == getattr(plain.budgets, kind).tolist()
    groups = told.run()["budgets"]
    assert groups == plain.run()["budgets"]
    more = {"sdflora": 0, "hilora": 4 * (6 * 24 + 6) + 768}.get(name, 4 * (6 * 24 + 6))  # a head; a probe by one rank
    assert [group["up"] - more for group in groups] == [2 * 768, 768]
    assert told.settings.byte_budgets == "1/2:1 MB,1/2:1535", "the run says what was asked"


@pytest.mark.parametrize(("name", "kind"), [("flexlora", "rank"), ("fedra", "layer")])
def test_fewer_bytes_than_any_adapter_takes_are_refused(simulate: Simulate, name: str, kind: str) -> None:
    with pytest.raises(InvalidValueError, match=f"767 bytes are too few, a {kind} takes 768: give as many at least"):
        simulate(name, rank=2, byte_budgets="1/2:4kB,1/2:767")


def test_budgets_of_bytes_stand_alone() -> None:
    both = TrainingSettings(byte_budgets="4kB", rank_budgets="8")
    with pytest.raises(InvalidValueError, match="byte_budgets say what ranks and layers clients have: give no other"):
        STRATEGIES["flexlora"]().check(both)


def test_nothing_set_limits_nobody() -> None:
    found = budgets(TrainingSettings(), population([3] * 4))
    assert found == Budgets(found.group)
    assert not found.group.any()
    assert found.rank(torch.tensor([1, 3]), 8).tolist() == [8, 8]


def test_every_share_gets_its_part_of_the_seen_and_of_the_unseen_clients() -> None:
    settings = TrainingSettings(rank_budgets="1/3:16,1/3:8,1/3:4", layer_budgets="1/3:12,1/3:9,1/3:6")
    found = budgets(settings, population([5] * 18, unseen=6))
    for clients, each in ((slice(0, 12), 4), (slice(12, 18), 2)):
        assert found.group[clients].bincount().tolist() == [each] * 3
    assert torch.equal(ranks(found), torch.tensor([16, 8, 4])[found.group])
    assert found.layers is not None
    assert torch.equal(found.layers, torch.tensor([12, 9, 6])[found.group])
    assert torch.equal(found.rank(torch.arange(18), 8), ranks(found).clamp_max(8))


def test_who_gets_them_depends_on_the_seed_alone_unless_asked_otherwise() -> None:
    text = "1/2:8,1/2:2"
    one, other = population(list(range(1, 21))), population(list(range(20, 0, -1)))
    drawn = [ranks(budgets(TrainingSettings(rank_budgets=text, seed=seed), one)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], ranks(budgets(TrainingSettings(rank_budgets=text), other)))
    by_images = budgets(TrainingSettings(rank_budgets=text, budgets_follow="images"), one)
    assert ranks(by_images).tolist() == [2] * 10 + [8] * 10
    groups = [i % 2 for i in range(20)]
    by_group = budgets(TrainingSettings(rank_budgets=text, budgets_follow="groups"), population([3] * 20, groups))
    assert ranks(by_group).tolist() == [8, 2] * 10


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_method_refuses_budgets_that_it_does_not_keep(name: str) -> None:
    method = STRATEGIES[name]()
    for kind in ("rank", "layer"):
        settings = TrainingSettings(**{f"{kind}_budgets": 1})
        if f"{kind}s" in KEEP.get(name, ()):
            method.check(settings)
        else:
            said = f"{name} has no use for budgets of {kind}s: leave {kind}_budgets out"
            with pytest.raises(InvalidValueError, match=said):
                method.check(settings)
    if name not in KEEP:
        with pytest.raises(InvalidValueError, match=f"{name} has no use for budgets: leave byte_budgets out"):
            method.check(TrainingSettings(byte_budgets="1kB"))


@pytest.mark.parametrize("name", ["flexlora", "flora"])
def test_a_budget_of_ranks_is_too_large_above_those_of_all_tiers(name: str) -> None:
    method, ranks = STRATEGIES["hilora"](), [4, 8, 6]
    method.check(TrainingSettings(rank=ranks, rank_budgets="1/2:8,1/2:2"))
    with pytest.raises(InvalidValueError, match="rank_budgets='1/2:9,1/2:2': hilora has adapters of rank 8 at most"):
        method.check(TrainingSettings(rank=ranks, rank_budgets="1/2:9,1/2:2"))
    with pytest.raises(InvalidValueError, match="has adapters of rank 4 at most"):
        STRATEGIES[name]().check(TrainingSettings(rank=ranks, rank_budgets="8"))


@pytest.mark.parametrize("name", ["fed-hello", "fedra"])
def test_a_budget_of_more_blocks_than_there_are_is_refused(simulate: Simulate, name: str) -> None:
    with pytest.raises(InvalidValueError, match="layer_budgets='1/2:3,1/2:1': the model has 2 blocks with adapters"):
        simulate(name, layer_budgets="1/2:3,1/2:1")


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InvalidValueError, match="are of different shares: a client has one budget of both"):
        budgets(TrainingSettings(rank_budgets="1/2:8,1/2:4", layer_budgets="1/3:3,2/3:2"), population([1]))
    with pytest.raises(InvalidValueError, match="by hand has no true groups: choose chance or images"):
        budgets(TrainingSettings(rank_budgets="1/2:8,1/2:4", budgets_follow="groups"), population([1] * 4))
