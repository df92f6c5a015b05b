"""Tiers that are weighed against each other, in training and in prediction."""

from __future__ import annotations

import pytest
import torch

from hilora.federated.engine.batched import Cohort, Task
from hilora.federated.engine.mixing import Fixed, Gate, mix_tiers, nearness
from hilora.federated.engine.placement import copied, place, placement
from hilora.federated.engine.state import Mix, Models, Table, stream
from hilora.federated.settings import RunConfig, per_tier
from hilora.models.backbone import Backbone
from tests.federated.conftest import CLASSES, same, squares

IMAGES = squares(60, 1)
SHARES = [torch.arange(0, 11), torch.arange(20, 29)]
IDS = torch.tensor([4, 2])


def make(backbone: Backbone, gated: bool = False) -> tuple[Cohort, Models]:
    """Two clients with a shared root and leaves of their own, none of them zero."""
    torch.manual_seed(0)
    run = RunConfig(batch_size=4, rank=per_tier(2), gamma_root=0.0, gamma_cluster=0.0, lr=per_tier(1e-2))
    cohort = Cohort(backbone, ("root", "leaf"), run, torch.device("cpu"), torch.get_default_dtype())
    tiers = {}
    for tier, slots in (("root", 1), ("leaf", 2)):
        state = cohort.fresh(tier, slots, stream(3, "fresh adapters", slots))
        state = {name: value if name[0] == "A" else torch.randn(value.shape) for name, value in state.items()}
        if gated and tier == "leaf":
            state["gate0"] = torch.randn(2, state["A0"].shape[1], 2, 24)
        tiers[tier] = Table(state, torch.arange(2) % slots)
    head = {"weight": torch.randn(1, CLASSES, 24), "bias": torch.zeros(1, CLASSES)}
    return cohort, Models(tiers, Table(head, torch.zeros(2, dtype=torch.long)))


def predictions(cohort: Cohort, models: Models) -> torch.Tensor:
    """The loss of each image alone, which tells predictions apart where accuracies would not."""
    singles = [share[:1] for share in SHARES]
    return cohort.evaluate(IMAGES, singles, models).loss


def test_a_gate_is_a_softmax_of_each_token() -> None:
    weight = torch.randn(3, 2, 2, 5)  # [P, G, 2, in]
    x = torch.randn(2, 7, 5)
    gains = Gate("leaf", "root", weight)(1, x)
    logits = torch.einsum("gmi,gki->gmk", x, weight[1])
    torch.testing.assert_close(gains["leaf"], logits.softmax(-1)[..., 0])
    torch.testing.assert_close(gains["leaf"] + gains["root"], torch.ones(2, 7))


def test_an_images_weight_is_that_of_all_its_tokens() -> None:
    gains = Fixed({"leaf": torch.tensor([[0.1, 0.2], [0.3, 0.4]]), "root": 0.5})(0, torch.zeros(2, 6, 5))
    assert gains["root"] == 0.5
    expected = torch.tensor([[0.1] * 3 + [0.2] * 3, [0.3] * 3 + [0.4] * 3])
    torch.testing.assert_close(gains["leaf"], expected)


def test_a_fixed_mix_is_that_of_scaled_adapters(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    cohort, models = make(backbone)
    mixed = predictions(cohort, models._replace(mix=Mix("leaf", "root", 0.3)))

    def scaled(tier: str, by: float) -> Table:
        state = models.tiers[tier].state
        return Table(
            {name: value * (by if name[0] == "B" else 1) for name, value in state.items()}, models.tiers[tier].slot
        )

    by_hand = models._replace(tiers={"root": scaled("root", 0.7), "leaf": scaled("leaf", 0.3)})
    torch.testing.assert_close(mixed, predictions(cohort, by_hand))
    assert not torch.allclose(mixed, predictions(cohort, models))  # and nothing of the mix is left behind


def test_a_gate_is_trained_with_its_adapter_and_clients_do_not_mix(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    cohort, models = make(backbone, gated=True)
    models = models._replace(mix=Mix("leaf", "root"))
    gates = models.tiers["leaf"].state["gate0"].clone()
    together = cohort.train(IMAGES, SHARES, models, Task("leaf", 2), IDS, "training")
    assert not torch.equal(together.adapters["gate0"], gates)
    assert torch.equal(models.tiers["leaf"].state["gate0"], gates)  # the start is left as it was
    for index in range(2):
        one = torch.tensor([index])
        alone = cohort.train(IMAGES, [SHARES[index]], models.rows(one), Task("leaf", 2), IDS[one], "training")
        assert same(together.rows(one).adapters, alone.adapters, 1e-9)


def test_a_gates_gradient_is_autograds(backbone: Backbone, double: None) -> None:
    """One step of AdamW moves every element by the rate along its sign; a gate that is moved by hand agrees."""
    backbone.model.double()
    cohort, models = make(backbone, gated=True)
    models = models._replace(mix=Mix("leaf", "root"))
    share = [share[:4] for share in SHARES]
    trained = cohort.train(IMAGES, share, models, Task("leaf"), IDS, "training")
    moved = trained.adapters["gate0"] - models.tiers["leaf"].state["gate0"]
    state = models.tiers["leaf"].state

    def loss(gate: torch.Tensor) -> torch.Tensor:
        tiers = {**models.tiers, "leaf": Table({**state, "gate0": gate}, torch.arange(2))}
        return cohort.evaluate(IMAGES, share, models._replace(tiers=tiers)).loss

    for client, place_ in ((0, (3, 1, 5)), (1, (0, 0, 20))):
        change = torch.zeros_like(state["gate0"])
        change[client][place_] = 1e-5
        slope = (loss(state["gate0"] + change) - loss(state["gate0"] - change))[client] / 2e-5
        assert abs(float(moved[client][place_])) == pytest.approx(1e-2, rel=1e-2)
        assert (slope > 0) == (moved[client][place_] < 0)


def test_nearness_is_the_mean_cosine_and_never_below_zero() -> None:
    references = torch.tensor([[[1.0, 0], [0, 2.0]]])
    images = torch.tensor([[[3.0, 0], [1.0, 1.0], [-1.0, -1.0]]])
    torch.testing.assert_close(nearness(images, references), torch.tensor([[0.5, 0.5**0.5, 0.0]]))


def test_instances_near_the_references_use_the_own_adapter_more(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    cohort, models = make(backbone)
    references = torch.stack([share[:3] for share in SHARES])
    near = predictions(cohort, models._replace(mix=Mix("leaf", "root", 0.8, references)))

    tables = copied(placement(cohort.banks, models), cohort.device)
    place(cohort.banks, tables)
    mix_tiers(cohort.banks, Mix("leaf", "root", 1.0), tables)  # the own adapter alone
    singles = torch.stack([share[:1] for share in SHARES])
    with torch.no_grad():
        features, anchors = (cohort._features(IMAGES.images[index]) for index in (singles, references))
    weights = 0.8 * nearness(features, anchors)[:, 0]
    assert (weights > 0).all()
    for client in range(2):
        one = torch.tensor([client])
        fixed = models.rows(one)._replace(mix=Mix("leaf", "root", float(weights[client])))
        alone = cohort.evaluate(IMAGES, [SHARES[client][:1]], fixed).loss
        torch.testing.assert_close(alone[0], near[client], rtol=1e-9, atol=1e-9)
