"""Where clusters come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError
from hilora.federated.grouping import GROUPINGS, GroupingSettings
from hilora.federated.grouping.kmeans import KMeansGrouping
from hilora.federated.grouping.subspace import SubspaceGrouping
from hilora.federated.settings import TrainingSettings
from tests.federated.conftest import same
from tests.federated.strategies.by_hand import GROUPS, SEEN, UNSEEN
from tests.federated.strategies.grouped import GroupedHalves, WithoutTruth


@pytest.mark.parametrize("groups", ["true", "random", "kmeans"])
def test_groups_may_come_from_elsewhere(groups: str) -> None:
    halves = GroupedHalves("hilora", groups=groups, k_max=4).all_rounds()
    member = halves.server.grouping.member
    found = halves.server.clustering()
    assert found is not None
    assert found.k == 2
    assert sorted(member[SEEN].bincount().tolist()) == [3, 3]
    assert (member[SEEN].tolist() == GROUPS[SEEN].tolist()) == (groups != "random")
    halves.admit()
    if groups != "random":
        assert member[UNSEEN].tolist() == GROUPS[UNSEEN].tolist()


def test_kmeans_compares_what_clients_change_of_the_product() -> None:
    grouping = KMeansGrouping(GroupingSettings(groups="kmeans"), TrainingSettings(), 3)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, B = drawn(1, 2, 2, 5), drawn(1, 2, 4, 2)
    turn = torch.linalg.qr(drawn(2, 2)).Q
    trained_A, trained_B = A + drawn(3, 2, 2, 5), B + drawn(3, 2, 4, 2)
    grouping.remember(torch.arange(2), AdapterTable([trained_A[:2]], [trained_B[:2]]), AdapterTable([A], [B]))
    turned = AdapterTable([turn.T @ A], [B @ turn])  # the same root in another basis
    grouping.remember(torch.tensor([2]), AdapterTable([turn.T @ trained_A[2:]], [trained_B[2:] @ turn]), turned)
    change = (trained_B @ trained_A - B @ A).flatten(1)
    everyone = torch.arange(3)
    torch.testing.assert_close(grouping._inner(everyone, everyone), change @ change.T)
    grouping.member = torch.tensor([0, 1, -1])
    grouping.join(torch.tensor([2]), torch.tensor([2]), everyone[:2], None)
    assert grouping.member[2] == torch.cdist(change[2:], change[:2]).argmin()


def test_ranks_that_nobody_holds_are_no_change_of_subspaces() -> None:
    """The server's mean fills all its ranks; clients that hold two of five leave the others as they are."""
    generator = torch.Generator().manual_seed(0)
    few, room = (
        SubspaceGrouping(GroupingSettings(), TrainingSettings(participation=1.0), 3, common=None) for _ in range(2)
    )
    for _ in range(2):
        A, B = (torch.randn(1, 2, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (9, 5)))
        server = AdapterTable([A], [B])
        held = server.first(2)
        moved = [torch.randn(3, 2, 9, 2, generator=generator, dtype=torch.float64) + held.B[0]]
        trained = AdapterTable([held.A[0].expand(3, -1, -1, -1)], moved)
        few.remember(torch.arange(3), trained, held)
        room.remember(torch.arange(3), trained.resized(5), server)
    bases = [grouping.bases(torch.arange(3)) for grouping in (few, room)]
    assert not bases[1][..., 2:].any()
    torch.testing.assert_close(*[U @ U.mT for U in bases])


def test_true_groups_are_asked_for_where_there_are_none() -> None:
    with pytest.raises(InvalidValueError, match="true groups"):
        WithoutTruth("hilora", groups="true").begin(1)


def test_an_unseen_client_joins_its_true_group_even_without_an_image() -> None:
    halves = GroupedHalves("hilora", [10] * 6 + [0, 0], groups="true").all_rounds()
    halves.admit()
    assert halves.server.grouping.member[UNSEEN].tolist() == GROUPS[UNSEEN].tolist()


@pytest.mark.parametrize("groups", list(GROUPINGS))
def test_what_a_grouping_knows_goes_through_a_checkpoint(groups: str) -> None:
    """Saved in the middle of the root's rounds, it forms the clusters that the first one forms."""
    halves, other = (GroupedHalves("hilora", groups=groups, k_max=4) for _ in range(2))
    halves.begin()
    halves.round()
    other.begin()
    other.server.load_state_dict(halves.server.state_dict())
    other.done = halves.done
    for one in (halves, other):
        one.round()
        one.begin(1)
        one.admit()
    assert other.server.grouping.member.tolist() == halves.server.grouping.member.tolist()
    assert same(other.server.root, halves.server.root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_min": 3, "k_max": 2}, "k_max .2. is below k_min .3."),
        ({"groups": "magic"}, "groups='magic'"),
        ({"subspace_decay": 1}, "subspace_decay=1"),
        ({"k_min": True}, "k_min=True: expected a number"),
    ],
)
def test_settings_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        GroupingSettings(**options)


def test_the_highest_number_of_clusters_follows_the_clients() -> None:
    def bounds(clients: int, **options: Any) -> tuple[int, int]:
        return GROUPINGS["subspace"](GroupingSettings(**options), TrainingSettings(), clients).bounds(clients)

    assert bounds(100) == (1, 50)
    assert bounds(16) == (1, 10)
    assert bounds(4) == (1, 4)
    assert bounds(100, k_max=7) == (1, 7)
    assert bounds(100, published=True) == (2, 50)
    assert bounds(1, published=True) == (1, 1)
