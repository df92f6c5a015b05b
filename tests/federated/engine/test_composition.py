"""Tiers that are weighed against each other, in training and in prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import hilora
from hilora.adapters.composition import Composition, Gate, Weights
from hilora.adapters.table import AdapterTable
from hilora.federated.client import Models
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.protocol import Head, Rows, shared
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies.feddpa import NearnessMix, nearness
from hilora.federated.streams import stream
from hilora.models.backbone import Backbone
from tests.federated.conftest import CLASSES, copied, same, squares
from tests.federated.engine.test_batched import task

IMAGES = squares(60, 1)
SHARES = [torch.arange(0, 11), torch.arange(20, 29)]
IDS = torch.tensor([4, 2])


def make(backbone: Backbone) -> tuple[BatchedEngine, Models]:
    """Two clients with a shared root and leaves of their own, none of them zero."""
    torch.manual_seed(0)
    settings, config = TrainingSettings(batch_size=4, lr=1e-2), hilora.HiLoRAConfig(r=2, tiers=("root", "leaf"))
    engine = BatchedEngine(backbone, config, settings, torch.device("cpu"), torch.get_default_dtype())
    tiers = {}
    for tier, slots in (("root", 1), ("leaf", 2)):
        table = engine.fresh(tier, slots, stream(3, "fresh adapters", slots))
        tiers[tier] = Rows(AdapterTable(table.A, [torch.randn(B.shape) for B in table.B]), torch.arange(2) % slots)
    return engine, Models(tiers, shared(Head(torch.randn(1, CLASSES, 24), torch.zeros(1, CLASSES)), IDS))


def gate() -> Gate:
    return Gate("leaf", "root", [torch.randn(2, 4, 2, 24)])


def trained(engine: BatchedEngine, models: Models, epochs: int = 2, which: slice = slice(None), **how: Any) -> Any:
    shares, what = SHARES[which], task("leaf", epochs, penalty=())
    return engine.train(IMAGES, shares, models, what, IDS[which], "training", **how)


def predictions(engine: BatchedEngine, models: Models, composition: Composition | None = None) -> torch.Tensor:
    """The loss of each image alone, which tells predictions apart where accuracies would not."""
    singles = [share[:1] for share in SHARES[: len(models.head.slot)]]
    return engine.evaluate(IMAGES, singles, replace(models, composition=composition)).loss


def test_a_gate_is_a_softmax_of_each_token() -> None:
    weight = torch.randn(2, 3, 2, 5)  # [n, P, 2, in]
    x = torch.randn(2, 7, 5)
    gains = Gate("leaf", "root", [weight]).gains(0)(1, x)
    logits = torch.einsum("gmi,gki->gmk", x, weight[:, 1])
    torch.testing.assert_close(gains["leaf"], logits.softmax(-1)[..., 0])
    torch.testing.assert_close(torch.as_tensor(gains["leaf"]) + gains["root"], torch.ones(2, 7))


def test_an_images_weight_is_that_of_all_its_tokens() -> None:
    gains = Weights({"leaf": torch.tensor([[0.1, 0.2], [0.3, 0.4]]), "root": 0.5}).gains(0)(0, torch.zeros(2, 6, 5))
    assert gains["root"] == 0.5
    expected = torch.tensor([[0.1] * 3 + [0.2] * 3, [0.3] * 3 + [0.4] * 3])
    torch.testing.assert_close(gains["leaf"], expected)


def test_fixed_weights_are_those_of_scaled_adapters(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    engine, models = make(backbone)
    mixed = predictions(engine, models, Weights({"leaf": 0.3, "root": 0.7}))

    def scaled(tier: str, by: float) -> Rows[AdapterTable]:
        table, slot = models.tiers[tier].table, models.tiers[tier].slot
        return Rows(AdapterTable(table.A, [by * B for B in table.B]), slot)

    by_hand = replace(models, tiers={"root": scaled("root", 0.7), "leaf": scaled("leaf", 0.3)})
    torch.testing.assert_close(mixed, predictions(engine, by_hand))
    assert not torch.allclose(mixed, predictions(engine, models))  # and nothing of the mix is left behind
    each = Weights({"leaf": torch.tensor([0.3, 0.3]), "root": torch.tensor([0.7, 0.7])})
    torch.testing.assert_close(predictions(engine, models, each), mixed)


def test_weights_of_each_client_do_not_stop_a_training_from_being_used_again(backbone: Backbone) -> None:
    engine, models = make(backbone)
    fixed = [Weights({"leaf": torch.tensor(values), "root": 0.5}) for values in ([0.2, 0.9], [0.7, 0.1])]
    first = trained(engine, replace(models, composition=fixed[0]))
    bench = engine._ready
    second = trained(engine, replace(models, composition=fixed[1]))
    assert engine._ready is bench is not None
    for result, weights in zip((first, second), fixed, strict=True):
        alone = trained(make(backbone)[0], replace(models, composition=weights))
        assert same(result.tiers["leaf"], alone.tiers["leaf"])
        assert result.composition is None  # they are not trained
    other = trained(engine, replace(models, composition=Weights({"leaf": fixed[1].tensors()["leaf"], "root": 0.9})))
    assert engine._ready is not bench  # another number is another training
    assert not same(other.tiers["leaf"], second.tiers["leaf"])
    plain = trained(engine, models)
    assert same(plain.tiers["leaf"], trained(make(backbone)[0], models).tiers["leaf"])


def test_a_gate_is_trained_with_its_adapter_and_clients_do_not_mix(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    engine, models = make(backbone)
    start = gate()
    before, models = copied(start), replace(models, composition=start)
    together = trained(engine, models)
    assert not same(together.composition, before)
    assert same(start, before)
    for index in range(2):
        one = torch.tensor([index])
        alone = trained(engine, models.of(one), which=slice(index, index + 1))
        assert same(together.tiers["leaf"].rows(one), alone.tiers["leaf"], 1e-9)
        assert same(together.composition.rows(one), alone.composition, 1e-9)


def test_a_gates_gradient_is_autograds(backbone: Backbone, double: None) -> None:
    """One step of AdamW moves every element by the rate along its sign; a gate that is moved by hand agrees."""
    backbone.model.double()
    engine, models = make(backbone)
    start, share = gate(), [share[:4] for share in SHARES]
    models = replace(models, composition=start)
    result = engine.train(IMAGES, share, models, task("leaf", 1, penalty=()), IDS, "training")
    assert result.composition is not None
    moved = result.composition.tensors()["gate.0"] - start.weight[0]

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return engine.evaluate(IMAGES, share, replace(models, composition=Gate("leaf", "root", [weight]))).loss

    for client, place in ((0, (3, 1, 5)), (1, (0, 0, 20))):
        change = torch.zeros_like(start.weight[0])
        change[client][place] = 1e-5
        slope = (loss(start.weight[0] + change) - loss(start.weight[0] - change))[client] / 2e-5
        assert abs(float(moved[client][place])) == pytest.approx(1e-2, rel=1e-2)
        assert (slope > 0) == (moved[client][place] < 0)


def test_nearness_is_the_mean_cosine_and_never_below_zero() -> None:
    references = torch.tensor([[[1.0, 0], [0, 2.0]]])
    images = torch.tensor([[[3.0, 0], [1.0, 1.0], [-1.0, -1.0]]])
    torch.testing.assert_close(nearness(images, references), torch.tensor([[0.5, 0.5**0.5, 0.0]]))


def test_instances_near_the_references_use_the_own_adapter_more(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    engine, models = make(backbone)
    references = torch.stack([share[:3] for share in SHARES])
    near = predictions(engine, models, NearnessMix(torch.full((2,), 0.8), references))

    singles = torch.stack([share[:1] for share in SHARES])
    engine.evaluate(IMAGES, list(singles), models)  # puts the adapters in place
    engine._compose(Weights({"leaf": 1.0, "root": 0.0}))  # the own adapter alone
    with torch.no_grad():
        features, anchors = (engine._features(IMAGES.images[index]) for index in (singles, references))
    weights = 0.8 * nearness(features, anchors)[:, 0]
    assert (weights > 0).all()
    for client in range(2):
        share = float(weights[client])
        fixed = replace(models.of(torch.tensor([client])), composition=Weights({"leaf": share, "root": 1 - share}))
        alone = engine.evaluate(IMAGES, [SHARES[client][:1]], fixed).loss
        torch.testing.assert_close(alone[0], near[client], rtol=1e-9, atol=1e-9)


def test_what_is_left_of_a_composition_is_nothing(backbone: Backbone) -> None:
    """A prediction or training with one leaves the next without one as it would be."""
    engine, models = make(backbone)
    plain = predictions(engine, models)
    for composition in (gate(), NearnessMix(torch.ones(2), torch.zeros(2, 1, dtype=torch.long))):
        predictions(engine, models, composition)
        assert torch.equal(predictions(engine, models), plain)
    trained(engine, replace(models, composition=gate()))
    assert torch.equal(predictions(engine, models), plain)
