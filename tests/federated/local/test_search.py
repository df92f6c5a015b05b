"""A search without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hilora.federated.local.search import evolve
from hilora.federated.streams import stream

GOAL = torch.tensor([[0.9, -0.4], [0.1, 0.2], [0.5, 0.5]])
START = torch.full((3, 2), 0.5)


def distance(points: Tensor) -> Tensor:
    found: Tensor = (points - GOAL).norm(dim=1)
    return found


def test_each_problem_comes_near_to_its_own_goal() -> None:
    best = evolve(distance, START, 200, stream(0, "search"))
    assert (distance(best) < 0.01).all()


def test_it_never_gets_worse_and_asks_as_often_as_it_may() -> None:
    asked: list[Tensor] = []

    def noted(points: Tensor) -> Tensor:
        asked.append(points)
        return distance(points)

    best = evolve(noted, START, 20, stream(0, "search"))
    assert len(asked) == 20
    assert torch.equal(asked[0], START)
    torch.testing.assert_close(distance(best), torch.stack([distance(one) for one in asked]).min(0).values)
    assert torch.equal(evolve(distance, START, 1, stream(0, "search")), START)


def test_a_loss_that_is_not_a_number_is_no_success() -> None:
    best = evolve(lambda points: torch.where(points == START, 1.0, torch.nan).sum(1), START, 20, stream(0, "search"))
    assert torch.equal(best, START)
