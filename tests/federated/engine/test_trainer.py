"""What strategies ask of clients."""

from __future__ import annotations

import pytest
import torch

from hilora.federated.engine.work import Diverged, Work
from tests.federated.conftest import Simulate


def work_of(simulate: Simulate, **options: object) -> Work:
    return simulate("fedit", **options)._work("training", 1)


def test_examples_are_the_clients_own_images(simulate: Simulate) -> None:
    work = work_of(simulate, sizes=[12, 3, 0, 5], unseen=0)
    clients = torch.tensor([0, 1, 2])
    found = work.examples(clients, 4)
    assert found.shape == (3, 4)
    assert torch.equal(found, work.examples(clients, 4))
    many, few, none = found
    assert len(set(many.tolist())) == 4
    assert set(many.tolist()) <= set(work.population.clients[0].train.tolist())
    assert set(few.tolist()) == set(work.population.clients[1].train.tolist())  # one of the three twice
    assert len(none) == 4  # another's


def test_pooled_images_are_one_clients(simulate: Simulate) -> None:
    simulation = simulate("fedit")
    work = simulation._work("training", 1)
    clients = simulation.population.seen
    trained = work.train(clients, simulation.strategy.models(clients), "root", pooled=True)
    assert trained.images.tolist() == [sum(len(simulation.population.clients[int(c)].train) for c in clients)]
    assert work.images == int(trained.images[0])


def test_only_what_is_trained_is_counted(simulate: Simulate) -> None:
    simulation = simulate("fedit")
    clients, models = simulation.population.seen, simulation.strategy.models(simulation.population.seen)
    head, factor = 6 * 24 + 6, 4 * 2 * 24  # four projections at rank 2
    for factors, expected in (("AB", 2 * factor + head), ("B", factor + head), ("", head)):
        work = simulation._work("training", 1)
        trained = work.train(clients, models, "root", factors=factors)
        assert work.parameters == expected
        start = models.tiers["root"].taken()
        moved = {name[0] for name, value in trained.adapters.items() if not torch.equal(value, start[name])}
        assert moved == set("AB" if factors == "AB" else factors)


def test_updates_that_are_not_finite_name_the_clients(simulate: Simulate) -> None:
    simulation = simulate("fedit", lr=1e30)
    clients = simulation.population.seen
    with pytest.raises(Diverged, match=r"clients \[0, 1, 2, 3, 4\] are not finite"):
        simulation._work("training", 1).train(clients, simulation.strategy.models(clients), "root", epochs=2)
