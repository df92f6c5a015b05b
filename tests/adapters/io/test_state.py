"""Adapters of one tier or slot, out of a model and into it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hilora
from hilora import AdapterTable, HiLoRAConfig
from hilora.adapters.injection import banks
from tests.helpers import CONFIG, images, injected, output, random, randomise, same, snapshot, values, vit

TWO = HiLoRAConfig(r=3, target_modules=("q", "v", "fc1"), slots={"root": 1, "cluster": 2, "leaf": 3})


def test_a_tier_goes_from_model_to_model() -> None:
    model, other = injected(TWO), injected(TWO, seed=1)
    for tier in ("root", "cluster", "leaf"):
        table = hilora.get_adapters(model, tier)
        assert len(table) == TWO.slot_count(tier)
        assert [tuple(A.shape[1:]) for A in table.A] == [(4, 3, 24), (2, 3, 24)]
        assert [tuple(B.shape[1:]) for B in table.B] == [(4, 24, 3), (2, 96, 3)]
        hilora.set_adapters(other, tier, table)
    assert same(values(other), values(model))
    table.A[0].zero_()
    assert banks(model)[0].A("leaf").any(), "a table is a copy"


def test_a_slot_is_a_client_s_adapter() -> None:
    model, other = injected(TWO), injected(TWO, seed=1)
    before = hilora.get_adapters(other, "leaf")
    one = hilora.get_adapters(model, "leaf", slot=2)
    assert len(one) == 1
    assert torch.equal(one.A[1][0], hilora.get_adapters(model, "leaf").A[1][2])
    hilora.set_adapters(other, "leaf", one, slot=0)
    after = hilora.get_adapters(other, "leaf")
    assert torch.equal(after.B[0][0], one.B[0][0])
    assert same([after.A[0][1:], after.B[1][1:]], [before.A[0][1:], before.B[1][1:]])


def test_a_factor_that_is_missing_stays() -> None:
    model, other = injected(TWO), injected(TWO, seed=1)
    own = hilora.get_adapters(other, "leaf")
    given = hilora.get_adapters(model, "leaf")
    hilora.set_adapters(other, "leaf", given.only("A"))
    hilora.set_adapters(other, "cluster", hilora.get_adapters(model, "cluster", 1).only("B"), slot=0)
    after = hilora.get_adapters(other, "leaf")
    assert same([*after.A, *after.B], [*given.A, *own.B])
    assert torch.equal(hilora.get_adapters(other, "cluster").B[0][0], hilora.get_adapters(model, "cluster").B[0][1])


def test_lower_ranks_are_filled_up_and_remembered(tmp_path: Path) -> None:
    model = injected(TWO)
    hilora.set_slots(model, cluster=torch.tensor([0]), leaf=torch.tensor([1]))
    small = injected(HiLoRAConfig(r=2, target_modules=TWO.target_modules, lora_alpha=16 * 2 / 3))
    randomise(small, 2)
    table = hilora.get_adapters(small, "leaf")
    hilora.set_adapters(model, "leaf", table, slot=1)
    assert hilora.get_adapters(model, "leaf").rank.tolist() == [3, 2, 3]
    assert hilora.get_adapters(model, "leaf", 1).nbytes().tolist() == table.nbytes().tolist()
    for tier, slot in (("root", None), ("cluster", 0)):
        hilora.set_adapters(model, tier, hilora.get_adapters(small, tier), slot=slot)
    torch.testing.assert_close(output(model, images(2)), output(small, images(2)))
    hilora.save_adapters(model, tmp_path / "a.safetensors")
    loaded = hilora.load_adapters(vit(), tmp_path / "a.safetensors")
    assert hilora.get_adapters(loaded, "leaf").rank.tolist() == [3, 2, 3]
    assert hilora.get_adapters(copy.deepcopy(loaded), "leaf").rank.tolist() == [3, 2, 3]
    hilora.set_slots(loaded, leaf=torch.tensor([4]))
    assert hilora.get_adapters(loaded, "leaf").rank.tolist() == [3, 2, 3, 3, 3]


def test_scales_of_adapters_are_put_into_the_model() -> None:
    model = injected(TWO)
    table = hilora.get_adapters(model, "leaf")
    hilora.set_adapters(model, "leaf", AdapterTable(table.A, table.B, table.rank, scale=torch.full((len(table),), 3.0)))
    again = hilora.get_adapters(model, "leaf")
    for new, old in zip(again.B, table.B, strict=True):
        torch.testing.assert_close(new, 3 * old)


def hold_scaled(model: nn.Module, scales: list[Tensor | None]) -> None:
    """Hold two leaf adapters in each bank, with scales of their own."""
    for seed, (bank, own) in enumerate(zip(banks(model), scales, strict=True)):
        A, B = (random(t.shape[0], 2, *t.shape[2:], seed=9 + seed) for t in (bank.A("leaf"), bank.B("leaf")))
        bank.hold("leaf", A, B, torch.tensor([0, 1], dtype=torch.int32), None, own)


@pytest.mark.parametrize("alike", [True, False])
def test_scales_of_what_is_held_go_from_model_to_model_and_into_files(alike: bool, tmp_path: Path) -> None:
    config, x = HiLoRAConfig(r=3, target_modules=("q", "v", "fc1")), images(2)
    model, other, scale = injected(config), injected(config), torch.tensor([2.0, 5.0])
    hold_scaled(model, [scale, scale if alike else None])
    want = output(model, x)
    table = hilora.get_adapters(model, "leaf")
    if alike:
        assert table.scale is not None
        assert torch.equal(table.scale, scale)
    hilora.set_adapters(other, "leaf", table)
    hilora.set_slots(other, leaf=torch.tensor([0, 1]))
    torch.testing.assert_close(output(other, x), want)
    hilora.save_adapters(model, tmp_path / "a.safetensors")
    loaded = hilora.load_adapters(vit(), tmp_path / "a.safetensors")
    hilora.set_slots(loaded, leaf=torch.tensor([0, 1]))
    torch.testing.assert_close(output(loaded, x), want)
    hilora.set_adapters(model, "leaf", hilora.get_adapters(other, "leaf", 1), slot=1)
    hilora.set_slots(model, leaf=torch.tensor([0, 1]))
    torch.testing.assert_close(output(model, x), want)


def test_training_keeps_what_was_filled_up_zero() -> None:
    model = injected(TWO)
    small = injected(HiLoRAConfig(r=2, target_modules=TWO.target_modules))
    hilora.set_adapters(model, "leaf", hilora.get_adapters(small, "leaf"))
    hilora.set_slots(model, cluster=torch.tensor([0]), leaf=torch.tensor([0]))
    hilora.set_active_tier(model, "leaf")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(images(2)).square().sum().backward()
        optimiser.step()
    table = hilora.get_adapters(model, "leaf")
    assert not any(A[:, :, 2:].any() for A in table.A)
    assert not any(B[..., 2:].any() for B in table.B)
    assert table.A[0][:, :, :2].any()


def test_other_numbers_of_adapters_and_what_trains_stays() -> None:
    model = injected(TWO)
    hilora.set_active_tier(model, "leaf")
    parameters = [id(p) for p in model.parameters()]
    hilora.set_adapters(model, "leaf", hilora.get_adapters(model, "leaf").rows(torch.tensor([2])))
    hilora.set_adapters(model, "cluster", hilora.get_adapters(model, "cluster", 1))
    assert [id(p) for p in model.parameters()] == parameters
    assert banks(model)[0].active == "leaf"
    model(images(2)).square().sum().backward()


def test_what_does_not_fit_changes_nothing() -> None:
    model = injected(TWO)
    hilora.set_slots(model, leaf=torch.tensor([2, 0]))
    leaf = hilora.get_adapters(model, "leaf")
    wide = hilora.get_adapters(injected(HiLoRAConfig(r=5, target_modules=TWO.target_modules)), "leaf")
    narrow = AdapterTable([A[..., :-1] for A in leaf.A], leaf.B)
    broken = leaf.each(torch.Tensor.clone)
    broken.B[1][1, 0, 3, 0] = torch.nan
    before = snapshot(model)
    for table, slot, error, message in [
        (wide, 0, ValueError, "adapters of rank 5 do not fit tier 'leaf', whose rank is 3: inject with a larger r"),
        (narrow, None, ValueError, r"do not fit tier 'leaf': expected A and B \[\(4, 3, 24\), \(4, 24, 3\)\]"),
        (narrow.rows(torch.tensor([0])), 0, ValueError, "do not fit tier 'leaf'"),
        (broken, None, ValueError, "are not finite"),
        (leaf, 0, ValueError, "slot 0 takes a table of one adapter, got 3"),
        (leaf.rows(torch.tensor([0])), 3, IndexError, "tier 'leaf' has 3 slots, there is no slot 3"),
        (leaf.rows(torch.tensor([0, 1])), None, ValueError, "slots use adapter 2 of tier 'leaf', the table has 2"),
        (leaf.rows(torch.tensor([0, 1])).only("A"), None, ValueError, "2 adapters without their A or B"),
        (AdapterTable(leaf.A[:1], leaf.B[:1]), None, ValueError, "1 shapes of projections, the model has 2"),
    ]:
        with pytest.raises(error, match=message) as raised:
            hilora.set_adapters(model, "leaf", table, slot)
        assert isinstance(raised.value, hilora.HiLoRAError)
        assert same(snapshot(model), before)
    for tier, slot, message in (("lief", None, "unknown tier 'lief'"), ("leaf", 7, "there is no slot 7")):
        with pytest.raises((ValueError, IndexError), match=message):
            hilora.get_adapters(model, tier, slot)


def test_a_merged_model_gives_its_adapters_and_takes_none() -> None:
    model = injected(CONFIG)
    table = hilora.get_adapters(model, "leaf")
    hilora.merge(model)
    assert same(hilora.get_adapters(model, "leaf").tensors(), table.tensors())
    with pytest.raises(ValueError, match=r"merged into the weights: take them out first, by hilora\.unmerge"):
        hilora.set_adapters(model, "leaf", table)


def test_a_model_on_its_way_through_other_dtypes_takes_them() -> None:
    model, other = injected(TWO), injected(TWO, seed=1).double()
    hilora.set_adapters(other, "leaf", hilora.get_adapters(model, "leaf"))
    assert other.blocks[0].attn.qkv.lora_A["leaf"].dtype == torch.float64
    assert same(hilora.get_adapters(other, "leaf").A[0].float(), hilora.get_adapters(model, "leaf").A[0])
    randomise(other)
