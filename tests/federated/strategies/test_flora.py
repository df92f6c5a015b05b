"""FLoRA: the stack is exact, each round begins anew, and the traffic is that of the stacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hilora.federated.streams import stream
from tests.federated.conftest import Simulate
from tests.federated.strategies.by_hand import ALL, CLIENTS, RANK, SEEN, UNSEEN, Halves, each, fresh

ONES = torch.ones(3, 20, RANK)


def of_a_round(round: int, share: Tensor) -> Tensor:
    """`Σ π_i B_i A_i` of a round: client i adds i + 1 to an A of its own and to a B of zeros."""
    A = fresh("leaf", CLIENTS, stream(0, "fresh adapters", round)).A[0]
    products = torch.stack([(i + 1) * ONES @ (A[i] + i + 1) for i in range(6)])
    mean: Tensor = (share.view(-1, 1, 1, 1) * products).sum(0)
    return mean


def product(halves: Halves) -> Tensor:
    ((A, B),) = halves.server.root.factors
    found: Tensor = (B @ A)[0]
    return found


def test_stacks_add_up_exactly_and_every_round_begins_anew() -> None:
    halves, share = Halves("flora", [30, 10, 10, 10, 10, 30, 10, 10], room=10), torch.tensor([3, 1, 1, 1, 1, 3]) / 10
    halves.begin()
    noted = halves.round()
    assert noted["cut"] == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(product(halves), of_a_round(1, share), rtol=1e-4, atol=1e-3)
    assert halves.server.root.rank.tolist() == [12]  # six clients of rank 2
    halves.round()
    total = of_a_round(1, share) + of_a_round(2, share)
    torch.testing.assert_close(product(halves), total, rtol=1e-4, atol=1e-3)
    assert halves.server.root.rank.tolist() == [20]  # of 24, the side of the layers
    call = halves.calls[-1]
    assert call.tier == "leaf"
    begun = call.models.tiers["leaf"].taken()
    assert not begun.B[0].any()
    assert len(begun.A[0].flatten(1).unique(dim=0)) == 6
    assert not torch.equal(begun.A[0], halves.calls[0].models.tiers["leaf"].taken().A[0])
    assert list(halves.models(SEEN).tiers) == ["root"]


def test_clients_may_have_unequal_ranks() -> None:
    held = [1, 2, 1, 2, 2, 2, 1, 2]
    halves = Halves("flora", ranks=held, room=10)
    leaf = halves.client.with_fresh(halves.store.of(ALL), halves._sent(ALL, 1), halves.trainer(ALL)).tiers["leaf"]
    assert leaf.taken().rank.tolist() == held
    assert not leaf.taken().A[0][0, :, 1:].any()
    halves.one_round()
    assert halves.server.stacked == [4 * 3 * 2 * 20 * sum(held[:6])]  # bytes of three projections, A and B


def test_what_there_is_no_room_for_is_cut_and_said() -> None:
    halves = Halves("flora", room=1)
    halves.begin()
    noted = halves.round()
    exact = of_a_round(1, torch.full((6,), 1 / 6))
    U, sigma, Vh = torch.linalg.svd(exact)
    best = U[..., :RANK] * sigma[..., None, :RANK] @ Vh[..., :RANK, :]
    torch.testing.assert_close(product(halves), best, rtol=1e-4, atol=1e-3)
    assert noted["cut"] == pytest.approx(float((exact - best).norm() / exact.norm()), abs=1e-5)


def test_a_newcomer_trains_on_top_of_what_was_merged() -> None:
    halves = Halves("flora").one_round()
    found = halves.personalised(UNSEEN)
    each(found.tiers["leaf"].taken().B[0], [7, 8])
    assert torch.equal(found.tiers["root"].taken().B[0][0], halves.server.root.B[0][0])


@pytest.mark.slow
def test_a_client_is_sent_every_stack_that_it_has_not_merged(simulate: Simulate) -> None:
    """Five clients train in six rounds; before the first there is none, and a newcomer needs them all."""
    moved = simulate("flora").run()["communication"]["per_client"]
    adapter, head = 2 * 4 * 4 * 2 * 24, 4 * (6 * 24 + 6)
    assert moved["up"] == [6 * (adapter + head)] * 5 + [0]
    assert moved["down"] == [5 * 5 * adapter + 6 * head] * 5 + [6 * 5 * adapter + head]


@pytest.mark.slow
def test_who_sat_rounds_out_catches_up(simulate: Simulate) -> None:
    simulation = simulate("flora", participation=0.4, rank_budgets="1/2:2,1/2:1")
    simulation.run()
    stacks, head = simulation.server.stacked, 4 * (6 * 24 + 6)  # type: ignore[attr-defined]
    assert len(set(stacks)) > 1
    assert simulation.post.down[5] == sum(stacks) + head
    for client in range(5):
        taken = int(simulation.post.down[client])
        assert any(taken == sum(stacks[:last]) + rounds * head for last in range(6) for rounds in range(7))


def test_what_is_merged_costs_no_flops(simulate: Simulate) -> None:
    """Clients of one rank train as much per image as they would in FlexLoRA, whatever has been merged."""
    flops = {}
    for name in ("flora", "flexlora"):
        out = simulate("fedit").out.parent / name
        groups = simulate(name, rank_budgets="1/2:2,1/2:1", rounds=[3, 0, 0], out=out).run()["budgets"]
        flops[name] = [group["flops"] for group in groups]
    assert flops["flora"] == pytest.approx(flops["flexlora"])
