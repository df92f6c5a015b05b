"""Methods whose clients train some of the blocks: what is drawn, sent and averaged, by hand. Client i adds i + 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.federated.budgets import Budgets
from hilora.federated.data.partitions import Population
from hilora.federated.strategies.fed_hello import by_importance, pattern
from hilora.federated.strategies.fedra import allocation
from tests.federated.conftest import Simulate, copied, population, same, squares
from tests.federated.strategies.by_hand import ALL, CLIENTS, PROJECTIONS, SEEN, UNSEEN, Halves, everywhere

LAYERS = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2])
METHODS = ["fed-hello", "fedra"]
IMAGES = [10, 20, 30, 10, 20, 30, 10, 10]


class Some(Halves):
    budgets = Budgets(LAYERS, layers=LAYERS)


def drawn(halves: Halves, clients: Tensor = SEEN) -> Tensor:
    blocks: Tensor = halves.server.drawn(clients)
    assert blocks.sum(1).tolist() == LAYERS[clients].tolist()
    return blocks


@pytest.mark.parametrize("name", METHODS)
def test_a_block_is_the_mean_over_those_that_trained_it_by_images(name: str) -> None:
    halves = Some(name, IMAGES)
    blocks = drawn(halves)
    A = halves.server.root.A[0].clone()
    halves.one_round()
    weights = torch.tensor(IMAGES)[:6, None] * blocks
    expected = (weights * (SEEN[:, None] + 1.0)).sum(0) / weights.sum(0)
    for block in range(PROJECTIONS):
        everywhere(halves.server.root.B[0][0, block], float(expected[block]))
        torch.testing.assert_close(halves.server.root.A[0][0, block], A[0, block] + expected[block])
    everywhere(halves.server.head.bias, float((torch.tensor(IMAGES)[:6] * (SEEN + 1.0)).sum() / 120))


@pytest.mark.parametrize("name", METHODS)
def test_a_block_that_nobody_trained_stays(name: str) -> None:
    halves = Some(name)
    one = torch.tensor([3])
    (there,) = drawn(halves, one)
    before = copied(halves.server.root)
    halves.one_round(one)
    assert torch.equal(halves.server.root.A[0][0, ~there], before.A[0][0, ~there])
    assert not halves.server.root.B[0][0, ~there].any()
    everywhere(halves.server.root.B[0][0, there], 4)


@pytest.mark.parametrize("name", METHODS)
def test_clients_send_the_blocks_that_they_trained_and_are_drawn_anew(name: str) -> None:
    halves = Some(name)
    halves.begin()
    allocations = []
    for _ in range(5):
        download = halves._sent(SEEN, halves.done + 1)
        upload = halves.ask(SEEN, download)
        assert download.blocks is not None
        assert torch.equal(upload.tiers["root"].has[0], download.blocks)
        each = upload.tiers["root"].nbytes()
        whole = int(halves.server.root.nbytes())
        assert (each * PROJECTIONS).tolist() == (whole * LAYERS[SEEN]).tolist()
        allocations.append(drawn(halves))
        halves.round()
    assert len({str(one.tolist()) for one in allocations}) > 1
    assert torch.equal(halves.server.drawn(SEEN), halves.server.drawn(SEEN))  # to look changes nothing
    everyone = halves.server.serve(halves.stage, ALL)
    assert not everyone.tiers["root"].table.has  # all predict with the whole model
    assert len(everyone.tiers["root"].table) == 1


def test_fed_hello_leaves_frozen_layers_in_and_fedra_takes_the_blocks_out() -> None:
    hello, fedra = Some("fed-hello").one_round(), Some("fedra").one_round()
    assert hello.calls[0].how["parts"].present is None
    assert not hello.calls[0].models.tiers["root"].table.has
    parts, sent = fedra.calls[0].how["parts"], fedra.calls[0].models.tiers["root"].taken()
    assert torch.equal(parts.present, parts.trained)
    assert torch.equal(sent.has[0], parts.present)
    for halves in (hello, fedra):
        assert halves.calls[0].how["parts"].trained.sum(1).tolist() == LAYERS[SEEN].tolist()
        halves.personalised()
        assert halves.calls[-1].how["parts"].trained.sum(1).tolist() == LAYERS[UNSEEN].tolist()


@pytest.mark.parametrize("name", METHODS)
def test_without_budgets_it_is_fedit(name: str) -> None:
    found, plain = Halves(name, IMAGES).all_rounds(), Halves("fedit", IMAGES).all_rounds()
    assert same(found.server.root, plain.server.root, 1e-6)
    assert same(found.server.head, plain.server.head, 1e-6)


def test_every_block_is_drawn_where_budgets_add_up_to_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for budgets in ([3, 3, 3, 3], [1] * 12, [12], [10, 1, 1], [4, 12]):
        for _ in range(20):
            found = allocation(torch.tensor(budgets), 12, generator)
            assert found.sum(1).tolist() == budgets
            assert found.any(0).all()
    few = allocation(torch.tensor([3, 4]), 12, generator)  # seven of twelve: none twice
    assert few.sum(1).tolist() == [3, 4]
    assert int(few.sum(0).max()) == 1


def test_the_allocation_is_random_in_all_blocks_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [allocation(torch.tensor([3, 6]), 12, generator).long() for _ in range(4000)]
    counts = torch.stack(drawn).sum(0)
    assert (counts[0] / 4000 - 3 / 12).abs().max() < 0.03
    assert (counts[1] / 4000 - 6 / 12).abs().max() < 0.03


def test_patterns_and_importance_weigh_thirds() -> None:
    assert pattern("triangle", 6).tolist() == [3, 3, 2, 2, 1, 1]
    assert pattern("inverted", 6).tolist() == [1, 1, 2, 2, 3, 3]
    assert pattern("uniform", 5).tolist() == [1] * 5
    assert pattern("bottleneck", 12).tolist() == [3, 3, 3, 2, 2, 1, 1, 2, 2, 3, 3, 3]
    values = torch.tensor([0.5, 9.0, 0.1, 7.0, 0.2, 0.3])
    assert by_importance(values).tolist() == [2, 3, 1, 3, 1, 2]


def test_blocks_of_more_weight_are_drawn_more_often() -> None:
    halves = Some("fed-hello", pattern="triangle")
    counts = torch.zeros(PROJECTIONS)
    for done in range(2000):
        halves.server.done = done
        counts += halves.server.drawn(torch.tensor([0]))[0]
    torch.testing.assert_close(counts / 2000, torch.tensor([3.0, 2, 1]) / 6, atol=0.04, rtol=0)


class Measured(Some):
    """Clients say that the last block matters most in the first round, and the first one in the third."""

    asked: list[int]

    def trainer(self, clients: Tensor) -> Any:
        trainer, done = super().trainer(clients), self.done

        def fisher(models: Any, tier: str, count: int) -> Tensor:
            self.asked.append(done)
            scores = torch.tensor([1.0, 2, 3]) if done < 3 else torch.tensor([3.0, 2, 1])
            return scores.expand(len(clients), 3) * (trainer.counts > 0)[:, None]

        trainer.fisher = fisher  # type: ignore[method-assign]
        return trainer


def test_the_fisher_information_holds_until_it_is_measured_again() -> None:
    halves = Measured("fed-hello", [10, 0, 10, 10, 10, 10, 10, 10], allocation="fisher", refresh=2, pattern="uniform")
    halves.asked = []
    halves.begin()
    found = [halves.server.weights.tolist()]
    for _ in range(4):
        halves.round()
        found.append(halves.server.weights.tolist())
    assert halves.asked == [1, 3]
    assert found == [[1, 1, 1], [1, 2, 3], [1, 2, 3], [3, 2, 1], [3, 2, 1]]


def people() -> Population:
    return population([12, 9, 12, 5, 8, 7], squares(42, 2), unseen=1)


@pytest.mark.parametrize(
    ("name", "options"), [("fedra", {}), ("fed-hello", {}), ("fed-hello", {"allocation": "fisher"})]
)
def test_runs_with_budgets(simulate: Simulate, name: str, options: dict[str, Any]) -> None:
    simulation = simulate(name, layer_budgets="1/2:2,1/2:1", rounds=[2, 2, 0], people=people(), **options)
    summary = simulation.run()
    large, small = summary["budgets"]
    assert (large["layers"], small["layers"]) == (2, 1)
    adapter, head, scores = 2 * 2 * 24 * 2 * 4, (6 * 24 + 6) * 4, 8 if options else 0  # of one block
    assert small["up"] == adapter + head + scores
    assert large["up"] == 2 * adapter + head + scores
    assert large["flops"] > small["flops"]
    assert (large["down"] > small["down"]) == (name == "fedra")
    assert CLIENTS == 8
