"""What clients can be asked to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.client import Models
from hilora.federated.engine.trainer import Diverged, Trainer
from tests.federated.conftest import Simulate

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
