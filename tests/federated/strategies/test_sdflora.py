"""SDFLoRA: what is stacked and compressed, what stays with a client, and how the two adapters are weighed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hilora.adapters.table import AdapterTable
from hilora.federated.local.sgd import LocalSGD
from hilora.federated.protocol import own
from hilora.federated.strategies.sdflora import FIRST, SigmoidGains
from hilora.models.backbone import Backbone
from tests.federated.conftest import Simulate, same
from tests.federated.engine.test_batched import IMAGES, SHARES, make, some_models, task, train
from tests.federated.strategies.by_hand import ALL, RANK, SEEN, UNSEEN, Halves, each, everywhere

ONES = torch.ones(3, 20, RANK)


def test_products_of_the_shared_adapter_are_averaged_and_the_rest_stays() -> None:
    halves = Halves("sdflora")
    A = halves.server.root.A[0][0].clone()
    first = halves.models(ALL)
    halves.one_round()
    assert halves.calls[0].tier == "root"
    assert halves.calls[0].how["algorithm"] == LocalSGD(also=("leaf",), rates="root")
    U, sigma, Vh = torch.linalg.svd(sum((i + 1) * ONES @ (A + i + 1) for i in range(6)) / 6)
    best = U[..., :RANK] * sigma[..., None, :RANK] @ Vh[..., :RANK, :]
    ((A, B),) = ((A[0], B[0]) for A, B in halves.server.root.factors)
    torch.testing.assert_close(B @ A, best, rtol=1e-4, atol=1e-4)
    models = halves.models(ALL)
    each(models.tiers["leaf"].taken().B[0], [1, 2, 3, 4, 5, 6, 0, 0])
    each(models.head.taken().bias, [1, 2, 3, 4, 5, 6, 0, 0])
    assert first.composition is not None
    assert models.composition is not None
    ((before, after),) = zip(first.composition.tensors().values(), models.composition.tensors().values(), strict=True)
    torch.testing.assert_close(before, torch.tensor(FIRST).expand(8, 3, 2))
    each(after - before, [1, 2, 3, 4, 5, 6, 0, 0])


def test_the_rank_stays_and_what_all_agree_on_stays_as_large_as_it_is() -> None:
    """However many clients there are: the stack is compressed, and weights sum to one."""
    for clients in (torch.tensor([4]), torch.tensor([4, 4, 4]), torch.tensor([4] * 20)):
        halves = Halves("sdflora")
        A = halves.server.root.A[0][0].clone()
        halves.one_round(clients)
        assert halves.server.root.r == RANK
        ((found, B),) = halves.server.root.factors
        torch.testing.assert_close((B @ found)[0], 5 * ONES @ (A + 5), rtol=1e-4, atol=1e-3)


def test_clients_of_unequal_ranks_stack_without_cross_terms() -> None:
    halves = Halves("sdflora", ranks=[1, 2, 1, 2, 2, 2, 1, 2])
    start = halves.server.root.A[0][0].clone()
    upload = halves.ask(SEEN, halves.server.configure(halves.stage, SEEN))
    trained = upload.tiers["root"].leading(torch.tensor([1, 2, 1, 2, 2, 2]))  # `ByHand` moves zeros, too
    halves.server.aggregate(halves.stage, replace(upload, tiers={"root": trained}))
    total = torch.zeros(3, 20, 20)
    for i, rank in enumerate([1, 2, 1, 2, 2, 2]):
        total += (i + 1) * ONES[..., :rank] @ (start[:, :rank] + i + 1)
    U, sigma, Vh = torch.linalg.svd(total / 6)
    best = U[..., :RANK] * sigma[..., None, :RANK] @ Vh[..., :RANK, :]
    ((A, B),) = halves.server.root.factors
    torch.testing.assert_close((B @ A)[0], best, rtol=1e-4, atol=1e-3)
    sent = halves.server.configure(halves.stage, ALL).tiers["root"].taken()
    assert sent.rank.tolist() == [1, 2, 1, 2, 2, 2, 1, 2]
    assert halves.models(ALL).tiers["leaf"].taken().rank.tolist() == [1, 2, 1, 2, 2, 2, 1, 2]


def test_a_newcomer_trains_its_own_half_under_the_shared_one() -> None:
    halves = Halves("sdflora").one_round()
    found = halves.personalised(UNSEEN)
    call = halves.calls[-1]
    assert (call.tier, call.how["rates"]) == ("leaf", "root")
    everywhere(found.tiers["leaf"].taken().B[0][0], 7)
    assert torch.equal(found.tiers["root"].taken().B[0][0], halves.server.root.B[0][0])
    assert found.composition is not None
    (gains,) = found.composition.tensors().values()
    everywhere(gains[1] - torch.tensor(FIRST), 8)


@pytest.mark.parametrize("size", [4, 1])
def test_gains_weigh_the_tiers_of_each_client_and_projection(backbone: Backbone, double: None, size: int) -> None:
    """As adapters whose B is that much larger."""
    backbone.model.double()
    torch.manual_seed(0)
    engine = make(backbone, clients_at_once=size)
    models = some_models(engine)
    models = replace(models, tiers={tier: models.tiers[tier] for tier in ("root", "leaf")})
    logits = [torch.randn(4, bank.shape[1], 2) for bank in models.tiers["root"].table.A]
    weighed = replace(models, composition=SigmoidGains(("root", "leaf"), logits))
    scaled = {}
    for place, (tier, rows) in enumerate(models.tiers.items()):
        table = rows.taken()
        gains = [torch.sigmoid(one[..., place])[..., None, None] for one in logits]
        scaled[tier] = AdapterTable(table.A, [B * gain for B, gain in zip(table.B, gains, strict=True)])
    expected = replace(models, tiers={tier: own(table) for tier, table in scaled.items()})
    a, b = (engine.evaluate(IMAGES, SHARES, one).loss for one in (weighed, expected))
    torch.testing.assert_close(a, b, equal_nan=True)


def test_gains_are_trained_as_one_by_one(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    torch.manual_seed(0)
    together, alone = (make(backbone, clients_at_once=size) for size in (4, 1))
    models = some_models(together)
    logits = [torch.randn(4, bank.shape[1], 2) for bank in models.tiers["root"].table.A]
    models = replace(models, composition=SigmoidGains(("root", "leaf"), logits))
    joint = task("root", algorithm=LocalSGD(also=("leaf",)))
    a, b = (train(engine, joint, models) for engine in (together, alone))
    assert a.composition is not None
    assert b.composition is not None
    assert models.composition is not None
    assert same(a.composition, b.composition, 1e-9)
    assert not same(a.composition, models.composition, 1e-3)
    assert all(same(a.tiers[tier], b.tiers[tier], 1e-9) for tier in ("root", "leaf"))


@pytest.mark.slow
def test_a_run_with_unequal_ranks(simulate: Simulate) -> None:
    simulation = simulate("sdflora", rank_budgets="1/2:2,1/2:1", rounds=[1, 1, 0])
    moved = simulation.run()["communication"]["per_client"]
    held = simulation.budgets.rank(torch.arange(6), 2)
    one = 4 * 4 * 2 * 24  # bytes of a rank: A and B of four projections of width 24
    assert moved["up"] == [2 * int(rank) * one for rank in held[:5]] + [0]
    assert moved["down"] == [2 * int(rank) * one for rank in held[:5]] + [int(held[5]) * one]
    assert set(held.tolist()) == {1, 2}
