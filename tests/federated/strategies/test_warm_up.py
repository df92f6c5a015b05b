"""What methods share whose clients train alone first."""

from __future__ import annotations

import pytest
import torch

from hilora.federated.strategies.warm_up import SHARED, WARM, spread_out
from tests.federated.strategies.by_hand import ALL, SEEN, Halves, each

METHODS = ["fedlease", "fedtreelora"]


@pytest.mark.parametrize("name", METHODS)
def test_clients_train_alone_in_the_rounds_of_the_root_and_then_together(name: str) -> None:
    halves = Halves(name, rounds=[2, 1, 1])
    assert [(stage.task, stage.rounds, stage.private) for stage in halves.stages] == [
        (WARM, 2, True),
        (SHARED, 2, False),
    ]
    start = halves.models(ALL).tiers["cluster"].taken().A[0]
    assert len(start.flatten(1).unique(dim=0)) == 1  # one A, so that their B compare
    halves.begin()
    halves.round()
    assert not halves.server.formed
    each(halves.B("cluster"), [1, 2, 3, 4, 5, 6, 0, 0])
    halves.round()
    each(halves.bias(), [2, 4, 6, 8, 10, 12, 0, 0])
    halves.begin(1)
    assert halves.server.formed
    each(halves.bias()[SEEN], [2, 4, 6, 8, 10, 12])  # the heads go on


@pytest.mark.parametrize("name", METHODS)
def test_where_nobody_answers_clients_go_on_alone(name: str) -> None:
    halves = Halves(name)
    halves.begin()
    halves.round()
    halves.stage = halves.stages[1]
    nobody = torch.empty(0, dtype=torch.long)
    halves.server.begin(halves.stage, SEEN, lambda clients, download: halves.ask(clients, download).rows(nobody))
    halves.round()
    each(halves.B("cluster"), [2, 4, 6, 8, 10, 12, 0, 0])


@pytest.mark.parametrize("name", METHODS)
def test_without_a_warm_up_all_are_of_one_group_or_as_good_as(name: str) -> None:
    halves = Halves(name, rounds=[0, 2, 1])
    halves.begin(1)
    halves.round()
    assert halves.models(SEEN).tiers["cluster"].taken().B[0].isfinite().all()


def test_who_was_not_there_has_the_most_frequent_label() -> None:
    labels = torch.tensor([[0, 1], [0, 2], [1, 2]])
    found = spread_out(labels, torch.tensor([1, 2, 4]), 5)
    assert found.tolist() == [[0, 2], [0, 1], [0, 2], [0, 2], [1, 2]]
    assert spread_out(labels[:, 0], torch.tensor([1, 2, 4]), 5).tolist() == [0, 0, 0, 0, 1]
