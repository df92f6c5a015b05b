"""Clients that train, or have, some of the model's blocks: together as one by one, and as what they stand for."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hilora.errors import InvalidValueError
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.engine.blocks import Blocks, Parts
from hilora.federated.local.sgd import LocalSGD
from hilora.federated.protocol import Rows
from hilora.models.backbone import Backbone
from tests.federated.conftest import same
from tests.federated.engine.test_batched import IMAGES, SHARES, make, some_models, task, train

SOME = torch.tensor([[True, False], [True, True], [False, True], [False, True]])
OPTIONS: dict[str, Any] = {"weight_decay": 0.1, "clip_norm": 0.05}  # both must leave alone what is not trained


def of_block(engine: BatchedEngine, block: int, tensor: Tensor) -> Tensor:
    """The projections `[n, P, ...]` of one block."""
    return tensor[:, engine.blocks.of[0] == block]


def test_blocks_are_found_and_named(backbone: Backbone) -> None:
    engine = make(backbone)
    assert engine.blocks.paths == ["blocks.0", "blocks.1"]
    assert engine.blocks.of[0].tolist() == [0, 0, 1, 1]  # q and v of each


@pytest.mark.parametrize("parts", [Parts(SOME), Parts.having(SOME)])
def test_together_is_the_same_as_one_by_one(backbone: Backbone, double: None, parts: Parts) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    together, alone = (make(backbone, clients_at_once=size, **OPTIONS) for size in (4, 1))
    models = some_models(together)
    a, b = (train(engine, "leaf", models, parts=parts) for engine in (together, alone))
    assert same(a.tiers["leaf"], b.tiers["leaf"], 1e-10)
    assert same(a.head, b.head, 1e-10)


@pytest.mark.parametrize("parts", [Parts(SOME), Parts.having(SOME)])
def test_what_is_not_trained_stays_to_the_bit(backbone: Backbone, parts: Parts) -> None:
    torch.manual_seed(0)
    engine = make(backbone, **OPTIONS)
    models = some_models(engine)
    start, trained = models.tiers["leaf"].taken(), train(engine, "leaf", models, parts=parts).tiers["leaf"]
    for before, after in ((start.A[0], trained.A[0]), (start.B[0], trained.B[0])):
        for block in range(2):
            there = of_block(engine, block, before), of_block(engine, block, after)
            stays = [torch.equal(*pair) for pair in zip(*there, strict=True)]
            assert stays == [not SOME[i, block] or not len(SHARES[i]) for i in range(4)]


def test_a_block_that_is_lacking_is_a_model_without_it(backbone: Backbone, double: None) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    shallow: Any = copy.deepcopy(backbone.model)
    shallow.blocks = nn.Sequential(shallow.blocks[1])
    engine, other = make(backbone), make(Backbone(shallow, "shallow", 16, backbone.mean, backbone.std, 24))
    models = some_models(engine)
    parts = Parts.having(torch.tensor([[False, True]] * 4))
    of_it = {tier: rows.table.each(lambda t: t[:, 2:]) for tier, rows in models.tiers.items()}
    alone = replace(models, tiers={tier: Rows(of_it[tier], rows.slot) for tier, rows in models.tiers.items()})
    a, b = train(engine, "leaf", models, parts=parts), train(other, "leaf", alone)
    assert same(a.tiers["leaf"].each(lambda t: t[:, 2:]), b.tiers["leaf"], 1e-10)
    assert same(a.head, b.head, 1e-10)
    assert not same(train(engine, "leaf", models, parts=Parts(parts.trained)).head, b.head, 1e-6)


def test_prediction_and_the_next_training_have_all_blocks(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    models = some_models(engine)
    before = engine.evaluate(IMAGES, SHARES, models)
    whole = train(engine, "leaf", models)
    train(engine, "leaf", models, parts=Parts.having(SOME))
    after = engine.evaluate(IMAGES, SHARES, models)
    torch.testing.assert_close(before, after, equal_nan=True, rtol=0, atol=0)
    assert same(train(engine, "leaf", models).tiers["leaf"], whole.tiers["leaf"])


def test_the_next_round_has_parts_of_its_own(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    models = some_models(engine)
    for mask in (SOME, ~SOME):
        a = train(engine, "leaf", models, parts=Parts.having(mask))
        b = train(make(backbone), "leaf", models, parts=Parts.having(mask))
        assert same(a.tiers["leaf"], b.tiers["leaf"])


@pytest.mark.parametrize("mask", [SOME[:3], SOME[:, :1], SOME.float()])
def test_parts_that_do_not_fit_are_refused(backbone: Backbone, mask: Tensor) -> None:
    engine = make(backbone)
    with pytest.raises(InvalidValueError, match=r"does not fit: expected bool \[4, 2\], a row for each client"):
        train(engine, "leaf", some_models(engine), parts=Parts(mask))


def test_two_tiers_in_one_step_are_one_optimiser_over_both(backbone: Backbone, double: None) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    together, alone = (make(backbone, clients_at_once=size, **OPTIONS) for size in (4, 1))
    models = some_models(together)
    joint = task("root", algorithm=LocalSGD(also=("leaf",), rates="leaf"), penalty=())
    a, b = (train(engine, joint, models) for engine in (together, alone))
    for tier in ("root", "leaf"):
        assert same(a.tiers[tier], b.tiers[tier], 1e-10)
    apart = {tier: train(together, task(tier, penalty=()), models).tiers[tier] for tier in ("root", "leaf")}
    assert not any(same(a.tiers[tier], apart[tier], 1e-6) for tier in apart)
    masked = train(together, joint, models, parts=Parts(SOME))
    start = models.tiers["root"].taken()
    assert torch.equal(of_block(together, 1, masked.tiers["root"].B[0])[0], of_block(together, 1, start.B[0])[0])


def test_a_number_that_begins_another_is_another_block() -> None:
    model: Any = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
    bank: Any = SimpleNamespace(names=[f"blocks.{i}.attn.q" for i in (1, 10, 11)])
    assert Blocks(model, [bank]).paths == ["blocks.1", "blocks.10", "blocks.11"]
