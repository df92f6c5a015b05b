"""A client that holds fewer ranks than there is room for is trained as one whose adapters have that rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hilora.adapters.table import AdapterTable
from hilora.federated.client import Models
from hilora.federated.local.sgd import LocalSGD
from hilora.federated.protocol import Rows, fitted, own
from hilora.models.backbone import Backbone
from tests.federated.conftest import same
from tests.federated.engine.test_batched import make, some_models, task, train

HELD = torch.tensor([2, 4, 1, 3])
OPTIONS: dict[str, Any] = {"rank": 4, "lora_alpha": 8, "weight_decay": 0.1, "clip_norm": 0.05}


def unequal(models: Models) -> Models:
    """The models of clients that hold 2, 4, 1 and 3 ranks."""
    return replace(models, tiers={tier: fitted(rows, HELD) for tier, rows in models.tiers.items()})


@pytest.mark.parametrize("tier", ["root", "leaf"])
def test_together_is_the_same_as_one_by_one(backbone: Backbone, double: None, tier: str) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    together, alone = (make(backbone, clients_at_once=size, **OPTIONS) for size in (4, 1))
    models = unequal(some_models(together))
    a, b = (train(engine, tier, models) for engine in (together, alone))
    assert same(a.tiers[tier], b.tiers[tier], 1e-10)
    assert a.tiers[tier].rank.tolist() == HELD.tolist()


@pytest.mark.parametrize("tier", ["root", "cluster", "leaf"])
def test_it_is_a_client_of_that_rank(backbone: Backbone, double: None, tier: str) -> None:
    """Under AdamW with decay, clipping and the penalty, on an engine that has no room for more."""
    torch.manual_seed(0)
    backbone.model.double()
    wide, narrow = make(backbone, **OPTIONS), make(backbone, **{**OPTIONS, "rank": 2, "lora_alpha": 4})
    models = some_models(wide)
    small = {t: fitted(rows, torch.full((4,), 2)) for t, rows in models.tiers.items()}
    tight = {t: Rows(rows.table.resized(2), rows.slot) for t, rows in small.items()}
    a = train(wide, tier, replace(models, tiers=small))
    b = train(narrow, tier, replace(models, tiers=tight))
    assert same(a.tiers[tier].resized(2), b.tiers[tier], 1e-10)
    assert same(a.head, b.head, 1e-10)
    for A, B in a.tiers[tier].factors:
        assert not A[:, :, 2:].any()
        assert not B[..., 2:].any()


def test_two_tiers_of_unequal_ranks_in_one_step(backbone: Backbone, double: None) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    together, alone = (make(backbone, clients_at_once=size, **OPTIONS) for size in (4, 1))
    models = unequal(some_models(together))
    joint = task("root", algorithm=LocalSGD(also=("leaf",)))
    a, b = (train(engine, joint, models) for engine in (together, alone))
    assert all(same(a.tiers[tier], b.tiers[tier], 1e-10) for tier in ("root", "leaf"))


def test_clients_get_the_leading_ranks_of_the_adapter_that_they_would_have() -> None:
    torch.manual_seed(0)
    table = AdapterTable([torch.randn(2, 3, 4, 5)], [torch.randn(2, 3, 6, 4)])
    slot, ranks = torch.tensor([1, -1, 0, 1, 1]), torch.tensor([2, 1, 4, 2, 3])
    rows = fitted(Rows(table, slot), ranks)
    assert len(rows.table) == 4  # with that of the client that has none
    assert (rows.slot >= 0).tolist() == [True, False, True, True, True]
    taken = rows.of(torch.tensor([0, 2, 3, 4])).taken()
    assert taken.rank.tolist() == [2, 4, 2, 3]
    for i, (row, rank) in enumerate(((1, 2), (0, 4), (1, 2), (1, 3))):
        assert torch.equal(taken.A[0][i, :, :rank], table.A[0][row, :, :rank])
        assert torch.equal(taken.B[0][i, ..., :rank], table.B[0][row, ..., :rank])
        assert not taken.A[0][i, :, rank:].any()
        assert not taken.B[0][i, ..., rank:].any()
    several = fitted(Rows(table, torch.tensor([[0, 1], [1, -1]])), torch.tensor([1, 4]))
    assert several.table.rank[several.slot[:, 0]].tolist() == [1, 4]
    assert several.slot[1, 1] == -1
    everyone = own(table)
    assert fitted(everyone, torch.tensor([4, 9])) is everyone


def test_the_next_training_leaves_the_ranks_of_the_last_alone(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone, **OPTIONS)
    models = some_models(engine)
    roots = [fitted(models.tiers["root"], ranks) for ranks in (torch.tensor([1, 2, 1, 2]), torch.tensor([3, 4, 3, 4]))]
    for root in roots:
        train(engine, "leaf", replace(models, tiers={**models.tiers, "root": root}))
    assert [root.table.rank.tolist() for root in roots] == [[1, 2], [3, 4]]
