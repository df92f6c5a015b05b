"""Of long tables only the rows of the clients at work are moved, and each into memory of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.engine.placement import Placement, arranged
from hilora.federated.protocol import Rows
from hilora.models.backbone import Backbone
from tests.federated.conftest import copied, same
from tests.federated.engine.test_batched import make, some_models, task, train


def test_of_long_tables_only_the_rows_of_the_clients_are_moved(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    leaf = some_models(engine).tiers["leaf"].table
    rows = Rows(leaf, torch.tensor([3, -1, 0, 1])).of(torch.tensor([1, 3]))
    found = arranged(engine.banks, {"leaf": rows})["leaf"]
    assert len(found.table) == 2
    assert found.slot.tolist() == [-1, 1]
    assert torch.equal(found.table.A[0][1], leaf.A[0][1])


def test_a_tier_in_training_is_each_clients_own(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    root = some_models(engine).tiers["root"]
    assert arranged(engine.banks, {"root": root})["root"] is root  # one row for all of them
    apart = arranged(engine.banks, {"root": root}, ("root",))["root"]
    assert (len(apart.table), apart.slot.tolist()) == (4, [0, 1, 2, 3])
    absent = arranged(engine.banks, {"root": root}, ("root",))["leaf"]
    assert (len(absent.table), len(absent.slot)) == (0, 0)


def test_what_is_placed_is_a_copy_that_can_be_overwritten_in_place(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    first, second = (arranged(engine.banks, some_models(engine).tiers, ("leaf",)) for _ in range(2))
    before = {tier: copied(rows.table) for tier, rows in first.items()}
    placement = Placement(engine.banks, first, engine.device)
    A, _ = placement.held["leaf"][0]
    address = A.data_ptr()
    placement.overwrite(second)
    assert placement.held["leaf"][0][0].data_ptr() == address
    for tier, rows in second.items():
        assert same(placement.table(tier), rows.table)
        assert same(first[tier].table, before[tier])
    placement.hold()
    (bank,) = engine.banks
    assert torch.equal(A.transpose(0, 1), second["leaf"].table.A[0])
    assert A.shape[:2] == (len(bank.names), 4)


def test_scales_are_placed_and_overwritten_with_what_they_belong_to(backbone: Backbone, double: None) -> None:
    """A scale in an adapter's own column is that adapter with another B."""
    torch.manual_seed(0)
    engine = make(backbone)
    models = some_models(engine)

    def losses(table: AdapterTable) -> Tensor:
        tiers = {**models.tiers, "leaf": Rows(table, models.tiers["leaf"].slot)}
        loss = train(engine, task("cluster", penalty=()), replace(models, tiers=tiers)).loss
        return loss[loss.isfinite()]

    plain = models.tiers["leaf"].table
    for scale in torch.tensor([[0.5, 2.0, -1.0, 3.0], [1.5, 0.0, 4.0, 1.0]], dtype=torch.float32):
        scaled = AdapterTable(plain.A, plain.B, plain.rank, scale=scale)
        torch.testing.assert_close(losses(scaled), losses(scaled.with_scale_in_B()))
        assert not torch.allclose(losses(scaled), losses(plain))


def test_an_adapter_that_all_clients_share_is_known(backbone: Backbone) -> None:
    engine = make(backbone)
    tiers = arranged(engine.banks, some_models(engine).tiers)
    assert Placement(engine.banks, tiers, engine.device).shared == {"root"}
    none_for_one = Rows(tiers["root"].table, torch.tensor([0, -1, 0, 0]))
    assert Placement(engine.banks, {**tiers, "root": none_for_one}, engine.device).shared == set()
