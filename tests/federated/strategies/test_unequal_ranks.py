"""Methods whose clients hold some ranks of one adapter, by hand. Client i adds i + 1 to what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.budgets import Budgets
from hilora.federated.client import Models, Trained
from hilora.federated.local.pruning import kept, tails
from hilora.federated.protocol import Upload
from tests.federated.conftest import Simulate, copied, same
from tests.federated.strategies import by_hand
from tests.federated.strategies.by_hand import ALL, CLIENTS, SEEN, Halves

RANK = 4
RANKS = torch.tensor([4, 2, 1, 4, 2, 1, 2, 1])
IMAGES = [10, 20, 30, 10, 20, 30, 10, 10]


def fresh(tier: str, slots: int, generator: torch.Generator, rows: Tensor | None = None) -> AdapterTable:
    A = torch.randn(slots, by_hand.PROJECTIONS, RANK, by_hand.WIDTH, generator=generator)
    table = AdapterTable([A], [torch.zeros(slots, by_hand.PROJECTIONS, by_hand.WIDTH, RANK)])
    return table if rows is None else table.rows(rows)


class InRank(by_hand.ByHand):
    """Clients change the ranks that they hold, and no others."""

    def train(self, models: Models, tier: str, **how: Any) -> Trained:
        trained = super().train(models, tier, **how)
        held = {name: table.leading(table.rank) for name, table in trained.tiers.items()}
        return Trained(trained.clients, held, trained.head, None, trained.images, trained.loss)


class Unequal(Halves):
    budgets = Budgets(RANKS, ranks=RANKS)

    def trainer(self, clients: Tensor) -> Any:
        return InRank(clients, self.weights, self.calls)


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_hand, "fresh", fresh)
    monkeypatch.setattr(by_hand, "RANK", RANK)


def uploaded(halves: Halves, clients: Tensor = SEEN) -> Upload:
    halves.begin()
    return halves.ask(clients, halves._sent(clients, 1))


def test_hetlora_weighs_by_norms_of_products_and_counts_zeros() -> None:
    halves = Unequal("hetlora", IMAGES, prune_decay=1)
    upload = uploaded(halves)
    table = upload.tiers["root"]
    assert table.rank.tolist() == RANKS[SEEN].tolist()
    norms = torch.stack([(B @ A).norm() for A, B in zip(table.A[0], table.B[0], strict=True)])
    share = norms / norms.sum()
    halves.server.aggregate(halves.stage, upload)
    root = halves.server.root
    torch.testing.assert_close(root.A[0][0], (share.view(-1, 1, 1, 1) * table.A[0]).sum(0))
    of_rank = [(share * (SEEN + 1))[RANKS[SEEN] > rank].sum() for rank in range(RANK)]
    torch.testing.assert_close(root.B[0][0, 0, 0], torch.stack(of_rank))  # zeros of the others are counted
    assert root.rank.tolist() == [RANK]
    images = torch.tensor(IMAGES)[:6]
    expected = (images * (SEEN + 1)).sum() / images.sum()
    torch.testing.assert_close(halves.server.head.bias, expected.expand(1, 4))


def test_hetlora_keeps_ranks_that_no_client_of_the_round_has() -> None:
    halves = Unequal("hetlora", prune_decay=1)
    before = copied(halves.server.root)
    halves.one_round(torch.tensor([1, 2]))  # of two ranks and of one
    root = halves.server.root
    assert torch.equal(root.A[0][:, :, 2:], before.A[0][:, :, 2:])
    assert root.rank.tolist() == [RANK]
    assert not torch.equal(root.A[0][:, :, :2], before.A[0][:, :, :2])
    sent = halves.server.configure(halves.stage, ALL).tiers["root"].taken()
    assert sent.rank.tolist() == RANKS.tolist()


def test_hetlora_takes_no_weight_from_a_client_without_images() -> None:
    halves = Unequal("hetlora", [0, 10, 10, 10, 10, 10, 10, 10], prune_decay=1).one_round()
    others = Unequal("hetlora", prune_decay=1).one_round(torch.tensor([1, 2, 3, 4, 5]))
    assert same(halves.server.root, others.server.root, 1e-6)


def test_a_client_prunes_if_its_last_ranks_weigh_less_than_before() -> None:
    """By then all weigh more but for those of client 3, whose training halves what it has."""
    halves = Unequal("hetlora", prune_decay=0.5).one_round()
    assert torch.equal(halves.server.held, RANKS)  # in the first round B was zero before
    train = InRank.train

    def halved(self: InRank, models: Models, tier: str, **how: Any) -> Trained:
        trained, start = train(self, models, tier, **how), models.tiers[tier].taken()
        mask = self.clients != 3
        return Trained(
            trained.clients,
            {tier: trained.tiers[tier].where(mask, start.each(lambda value: value / 2))},
            trained.head,
            None,
            trained.images,
            trained.loss,
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(InRank, "train", halved)
        upload = halves.ask(SEEN, halves._sent(SEEN, 2))
    expected = RANKS[SEEN].clone()
    expected[3] = 2
    assert upload.tiers["root"].rank.tolist() == expected.tolist()
    assert not upload.tiers["root"].B[0][3, ..., 2:].any()
    halves.server.aggregate(halves.stage, upload)
    assert halves.server.held[SEEN].tolist() == expected.tolist()
    assert halves.server.configure(halves.stage, SEEN).tiers["root"].taken().rank.tolist() == expected.tolist()


def test_tails_by_hand() -> None:
    assert kept(torch.tensor([1, 2, 8, 16]), 0.99).tolist() == [1, 1, 7, 15]
    A, B = torch.ones(2, 3, 4, 5), 2 * torch.ones(2, 3, 6, 4)
    table = AdapterTable([A], [B]).leading(torch.tensor([4, 1]))
    expected = 3 * (2 * 5) ** 0.5 * 2 * (6 * 2) ** 0.5  # three projections, two ranks of four
    torch.testing.assert_close(tails(table, 0.5), torch.tensor([expected, 0.0]))


def test_the_penalty_shrinks_the_last_ranks_of_each_client_alone(simulate: Simulate, double: None) -> None:
    """Also from a B of zeros, where a norm has no gradient."""
    found = []
    for weight in (0.0, 1.0):
        simulation = simulate(
            "hetlora",
            rank=4,
            rank_budgets="1/2:4,1/2:2",
            prune_decay=0.5,
            prune_weight=weight,
            local_epochs=2,
            rounds=[1, 0, 0],
            out=simulate("fedit").out.parent / str(weight),
        )
        simulation.backbone.model.double()
        clients = simulation.population.seen
        download = simulation.server.configure(simulation.current, clients).at(1)
        state, trainer = simulation.store.of(clients), simulation.trainer(clients, "training", 1)
        found.append(simulation.client.local(state, download, trainer).tiers["root"])
    free, bound = found
    assert free.rank.tolist() == bound.rank.tolist()
    assert bound.finite().all()
    assert (tails(bound, 0.5) < 0.9 * tails(free, 0.5)).all()


def test_hetlora_without_budgets_or_pruning_is_fedit_weighed_by_norms(simulate: Simulate) -> None:
    summary = simulate("hetlora", rank_budgets="1/2:2,1/2:1", prune_decay=0.5).run()
    large, small = summary["budgets"]
    assert (large["ranks"], small["ranks"]) == (2, 1)
    assert small["up"] == (2 * 2 * 24 * 2 + 6 * 24 + 6) * 4
    assert large["up"] <= (2 * 2 * 24 * 4 + 6 * 24 + 6) * 4


def test_fslora_sends_the_rows_and_columns_that_were_drawn() -> None:
    halves = Unequal("fslora")
    halves.server.root.B[0].normal_(generator=torch.Generator().manual_seed(0))
    places = halves.server.places(SEEN)
    sent = halves._sent(SEEN, 1).tiers["root"].taken()
    root = halves.server.root
    assert sent.rank.tolist() == RANKS[SEEN].tolist()
    for i in range(6):
        for j in range(RANK):
            whole = j < RANKS[i]
            expected = root.A[0][0, :, places[i, j]], root.B[0][0, ..., places[i, j]]  # of one and the same rank
            assert torch.equal(sent.A[0][i, :, j], expected[0] * whole)
            assert torch.equal(sent.B[0][i, ..., j], expected[1] * whole)


def test_fslora_divides_by_all_clients_of_the_round() -> None:
    halves = Unequal("fslora", IMAGES)
    places, before = halves.server.places(SEEN), copied(halves.server.root)
    halves.one_round()
    drawn = torch.zeros(6, RANK)
    for i in range(6):
        drawn[i, places[i, : RANKS[i]]] = 1
    share = torch.tensor(IMAGES)[:6] / 120
    change = (share[:, None] * drawn * (SEEN[:, None] + 1)).sum(0)  # those that did not draw a rank changed nothing
    torch.testing.assert_close(halves.server.root.B[0][0, 0, 0], change)
    torch.testing.assert_close(halves.server.root.A[0][0] - before.A[0][0], change[None, :, None].expand(3, 4, 20))


def test_fslora_draws_anew_each_round_and_predicts_with_all_ranks() -> None:
    halves = Unequal("fslora")
    first = halves.server.places(SEEN)
    assert torch.equal(first, halves.server.places(SEEN))
    assert torch.equal(first[2:3], halves.server.places(torch.tensor([2])))  # whoever else takes part
    halves.one_round()
    assert not torch.equal(first, halves.server.places(SEEN))
    assert halves.models(ALL).tiers["root"].taken().rank.tolist() == [RANK] * CLIENTS
    counts = torch.zeros(RANK)
    for done in range(400):
        halves.server.done = done
        counts[halves.server.places(torch.tensor([2]))[0, 0]] += 1
    assert (counts / 400 - 0.25).abs().max() < 0.08  # a mask that does not turn would be another method


def test_fslora_with_full_ranks_is_fedit(simulate: Simulate, double: None) -> None:
    """A rank drawn in another place is the same model."""
    runs = []
    for name in ("fslora", "fedit"):
        simulation = simulate(name, rounds=[2, 0, 0], out=simulate("fedit").out.parent / name)
        simulation.backbone.model.double()
        simulation.run()
        runs.append(simulation.models(torch.arange(6)))
    assert same(runs[0].tiers["root"].table, runs[1].tiers["root"].table, 1e-9)
    assert same(runs[0].head.table, runs[1].head.table, 1e-9)


def test_fslora_scales_by_r_over_k_and_the_server_counts_the_factors_as_they_are() -> None:
    halves = Unequal("fslora")
    sent = halves._sent(SEEN, 1).tiers["root"].taken()
    assert sent.scale is not None
    assert sent.scale.tolist() == (RANK / RANKS[SEEN]).tolist()
    assert uploaded(halves).tiers["root"].scale is None
    everyone = halves.server.serve(halves.stage, SEEN).tiers["root"].taken()
    assert everyone.scale is None


def test_fslora_has_no_scale_where_all_hold_all_ranks() -> None:
    class Full(Unequal):
        budgets = Budgets(RANKS, ranks=torch.full_like(RANKS, RANK))

    assert Full("fslora")._sent(SEEN, 1).tiers["root"].taken().scale is None
