"""What clients predict."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError
from hilora.federated.engine.predictor import Scores
from hilora.federated.protocol import Head, Rows, shared
from hilora.models.backbone import Backbone
from tests.federated.conftest import CLASSES, same
from tests.federated.engine.test_batched import IDS, IMAGES, SHARES, make, some_models


def test_accuracy_of_each_client_on_its_own_images(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone, clients_at_once=3)
    models = some_models(engine)
    together = engine.evaluate(IMAGES, SHARES, models).correct
    assert together.isnan().tolist() == [False, False, True, False]
    for i in (0, 1, 3):
        alone = engine.evaluate(IMAGES, [SHARES[i]], models.of(torch.tensor([i]))).correct
        assert together[i] == alone[0]
    certain = Head(torch.zeros(1, CLASSES, 24), torch.eye(CLASSES)[2:3])
    always_two = replace(models, head=shared(certain, IDS))
    expected = (IMAGES.labels[SHARES[0]] == 2).double().mean()
    assert engine.evaluate(IMAGES, SHARES, always_two).correct[0] == pytest.approx(float(expected))


def test_without_an_adapter_of_a_tier_a_client_predicts_with_the_others(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    models = some_models(engine)
    leaf = models.tiers["leaf"]
    zero = AdapterTable(leaf.table.A, [torch.zeros_like(B) for B in leaf.table.B])

    def with_leaf(rows: Rows[AdapterTable]) -> Scores:
        return engine.evaluate(IMAGES, SHARES, replace(models, tiers={**models.tiers, "leaf": rows}))

    expected = with_leaf(Rows(zero, leaf.slot)).loss
    absent = replace(models, tiers={tier: models.tiers[tier] for tier in ("root", "cluster")})
    torch.testing.assert_close(engine.evaluate(IMAGES, SHARES, absent).loss, expected, equal_nan=True)
    torch.testing.assert_close(with_leaf(Rows(leaf.table, torch.full((4,), -1))).loss, expected, equal_nan=True)
    assert not torch.allclose(with_leaf(leaf).loss, expected, equal_nan=True)


def test_fresh_adapters_depend_on_the_stream_alone_and_do_nothing(backbone: Backbone) -> None:
    engine = make(backbone)
    one, other, third = (engine.fresh("leaf", 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert same(one, other)
    assert not same(one, third)
    assert not any(B.any() for B in one.B)
    assert [A.shape for A in one.A] == [(3, 4, 1, 24)]


def test_fresh_adapters_of_some_clients_are_those_of_all_of_them(backbone: Backbone) -> None:
    engine = make(backbone)
    for rows in ([4], [6, 1], [0, 2, 3, 4, 5, 6]):
        everyone, few = (torch.Generator().manual_seed(3) for _ in range(2))
        index = torch.tensor(rows)
        found = engine.fresh("leaf", 7, few, index)
        assert same(found, engine.fresh("leaf", 7, everyone).rows(index))
        assert torch.equal(torch.rand(2, generator=few), torch.rand(2, generator=everyone))  # the streams go on alike


def test_a_rank_above_the_sides_of_a_projection_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InvalidValueError, match="rank 25 of tier 'cluster' exceeds the sides"):
        make(backbone, rank=[2, 25, 2])


def test_the_model_is_kept_with_all_clients_adapters(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    leaf = some_models(engine).tiers["leaf"].table
    engine.keep({"leaf": leaf})
    (bank,) = engine.banks
    assert torch.equal(bank.B("leaf").transpose(0, 1), leaf.B[0])
    assert bank.A("root").shape[1] == 0
