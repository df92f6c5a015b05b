"""What clients can be asked to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.client import Models, Trained
from hilora.federated.engine.placement import Placement, arranged
from hilora.federated.engine.trainer import Diverged, Trainer
from hilora.federated.strategies import STRATEGIES
from tests.federated.conftest import Simulate, records, same

ADAPTER, HEAD = 2 * 4 * 2 * 24, 6 * 24 + 6  # A and B of four projections at rank 2; weight and bias of six classes


def at_work(simulate: Simulate, clients: Tensor | None = None, **options: Any) -> tuple[Trainer, Models]:
    """Clients at work, and what they start from."""
    simulation = simulate("fedit", **options)
    clients = simulation.population.seen if clients is None else clients
    return simulation.trainer(clients, "training", 1), simulation.models(clients)


def test_examples_are_the_clients_own_images(simulate: Simulate) -> None:
    trainer, _ = at_work(simulate, torch.tensor([0, 1, 2]), sizes=[12, 3, 0, 5], unseen=0)
    found = trainer.examples(4)
    assert found.shape == (3, 4)
    assert torch.equal(found, trainer.examples(4))
    many, few, none = found
    members = trainer.population.clients
    assert len(set(many.tolist())) == 4
    assert set(many.tolist()) <= set(members[0].train.tolist())
    assert set(few.tolist()) == set(members[1].train.tolist())  # one of the three twice
    assert len(none) == 4  # another's
    assert trainer.counts.tolist() == [12, 3, 0]


def test_pooled_images_are_one_clients(simulate: Simulate) -> None:
    trainer, models = at_work(simulate)
    trained = trainer.train(models, "root", pooled=True)
    assert trained.images.tolist() == [12 + 9 + 12 + 5 + 8]
    assert trainer.images == int(trained.images[0])


@pytest.mark.parametrize(("factors", "numbers"), [("AB", ADAPTER + HEAD), ("B", ADAPTER // 2 + HEAD), ("", HEAD)])
def test_only_what_is_trained_is_counted_and_moves(simulate: Simulate, factors: str, numbers: int) -> None:
    trainer, models = at_work(simulate)
    trained, start = trainer.train(models, "root", factors=factors), models.tiers["root"].taken()
    assert trainer.parameters == numbers
    table = trained.tiers["root"]
    assert [not torch.equal(table.A[0], start.A[0]), not torch.equal(table.B[0], start.B[0])] == [
        "A" in factors,
        "B" in factors,
    ]


def test_a_frozen_head_is_not_moved(simulate: Simulate) -> None:
    trainer, models = at_work(simulate)
    assert torch.equal(trainer.train(models, "root", head=False).head.weight, models.head.taken().weight)


def test_epochs_are_those_of_a_round_unless_a_number_is_given(simulate: Simulate) -> None:
    trainer, models = at_work(simulate, local_epochs=2)
    total = trainer.counts
    assert torch.equal(trainer.train(models, "root").images, 2 * total)
    assert torch.equal(trainer.train(models, "root", epochs=1).images, total)
    assert trainer.images == 3 * int(total.sum())
    for wrong in (0, -1):
        with pytest.raises(InvalidValueError, match=f"epochs={wrong}: expected at least 1"):
            trainer.train(models, "root", epochs=wrong)


def test_updates_that_are_not_finite_name_the_clients(simulate: Simulate) -> None:
    trainer, models = at_work(simulate, lr=1e30)
    with pytest.raises(Diverged, match=r"clients \[0, 1, 2, 3, 4\] are not finite"):
        trainer.train(models, "root", epochs=2)


def test_an_update_that_is_not_finite_is_left_out_and_the_others_go_on(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if the client had no images: its adapter and head stay, and neither the mean nor the count has it."""
    trainer, models = at_work(simulate)
    whole = trainer.train(models, "root")
    train = trainer.engine.train

    def broken(*given: Any) -> Trained:
        trained = train(*given)
        trained.tiers["root"].B[0][2] = torch.nan
        trained.head.bias[4] = torch.inf
        return trained

    monkeypatch.setattr(trainer.engine, "train", broken)
    trained = trainer.train(models, "root")
    assert trainer.skipped == [2, 4]
    assert "clients [2, 4] are not finite and left out" in caplog.text
    started = models.tiers["root"].taken(), models.head.taken()
    for client in range(5):
        expected = started if client in (2, 4) else (whole.tiers["root"], whole.head)
        for found, stack in zip((trained.tiers["root"], trained.head), expected, strict=True):
            assert same(found.rows(torch.tensor([client])), stack.rows(torch.tensor([client])))
    assert torch.equal(trained.images, whole.images * torch.tensor([1, 1, 0, 1, 0]))
    assert trained.loss.isnan().tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_goes_on_without_a_client_that_diverged(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    simulation = simulate(strategy, rounds=[1, 1, 1])
    train, done = simulation.engine.train, list[int]()

    def once(*given: Any) -> Trained:
        trained = train(*given)
        if not done and len(trained.images) > 1:
            done.append(int(trained.clients[1]))
            trained.head.weight[1] = torch.nan
        return trained

    monkeypatch.setattr(simulation.engine, "train", once)
    summary = simulation.run()
    assert summary["final"]["mean"] is not None
    skipped = [client for record in records(simulation) for client in record.get("skipped", [])]
    assert skipped in (done, [])  # none where it was a probe


def test_fisher_information_is_the_mean_of_squared_gradients_of_single_images(simulate: Simulate, double: None) -> None:
    simulation = simulate(rounds=[1, 1, 0], lora_dropout=0.0)
    simulation.backbone.model.double()
    simulation.run()
    clients = torch.tensor([0, 3])
    trainer, models = simulation.trainer(clients, "fisher"), simulation.models(clients)
    engine, images = simulation.engine, simulation.train_images
    found = trainer.fisher(models, "root", 3)
    for row, examples in enumerate(trainer.examples(3)):
        squares = torch.zeros(2)
        for image in examples:
            picked = models.of(torch.tensor([row]))
            placement = Placement(engine.banks, arranged(engine.banks, picked.tiers), engine.device)
            placement.hold()
            ((A, B),) = placement.held["root"]
            pair = [A.requires_grad_(), B.requires_grad_()]
            logits = engine._logits(images.images[image][None, None], picked.head.taken())
            loss = F.cross_entropy(logits[0], images.labels[image][None])
            for gradient in torch.autograd.grad(loss, pair):
                squares.index_add_(0, engine.blocks.of[0], gradient.square().sum((1, 2, 3)).to(squares))
        torch.testing.assert_close(found[row].double(), squares / 3, rtol=1e-5, atol=0)
    assert found.gt(0).all()


def test_a_client_without_images_has_no_fisher_information(simulate: Simulate) -> None:
    simulation = simulate("fedit", sizes=[3, 0, 5], unseen=0, rounds=[1, 0, 0])
    simulation.run()  # a head of zeros has no gradients for adapters
    clients = torch.arange(3)
    found = simulation.trainer(clients, "fisher").fisher(simulation.models(clients), "root", 2)
    assert found.any(1).tolist() == [True, False, True]
