"""Several clients in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig
from hilora.adapters.injection import banks
from tests.helpers import TIERS, gradients, images, injected, output, randomise, same, values, vit
from tests.vits import timm_model


def clients(model: nn.Module, slots: dict[str, list[int]], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs of G clients, each with a model and one adapter of each tier; and the gradients of the tables."""
    outputs, total = [], [torch.zeros_like(value) for value in values(model)]
    for client, rows in enumerate(x.chunk(len(next(iter(slots.values()))))):
        own = copy.deepcopy(model)
        hilora.set_slots(own, **dict.fromkeys(TIERS))
        chosen = {tier: slots[tier][client] if tier in slots else 0 for tier in TIERS}
        for bank in banks(own):
            for tier, slot in chosen.items():
                A, B = bank.A(tier).detach(), bank.B(tier).detach()
                bank.assign(tier, A[:, max(slot, 0)][:, None], (B * (slot >= 0))[:, max(slot, 0)][:, None])
        y = own(rows)
        outputs.append(y)
        y.square().sum().backward()
        tiers = [tier for bank in banks(own) for tier in 2 * bank.tiers]
        for sum_, tier, gradient in zip(total, tiers, gradients(own), strict=True):
            if chosen[tier] >= 0:
                sum_[:, chosen[tier]] += gradient[:, 0]
    return torch.cat(outputs), total


@pytest.mark.parametrize("active", TIERS)
@pytest.mark.parametrize(
    "make", [vit, lambda: timm_model("cait_xxs24_224", img_size=32, embed_dim=24, depth=1, num_heads=2)]
)
def test_a_batch_of_several_clients_is_that_many_models(make: Callable[[], nn.Module], active: str) -> None:
    model = hilora.inject(make().double(), HiLoRAConfig(r=2, slots={"root": 1, "cluster": 2, "leaf": 1}))
    slots = {"cluster": [1, 0, 1], "leaf": [5, -1, 0]}
    hilora.set_slots(model, **{tier: torch.tensor(slot) for tier, slot in slots.items()})
    randomise(model)
    hilora.set_active_tier(model, active)
    size = 16 if hasattr(model, "norm_pre") else 32
    x = images(6, size, dtype=torch.float64)
    expected, expected_gradients = clients(model, slots, x)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    for got, want in zip(gradients(model), expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert any(gradient.any() for gradient in expected_gradients)


def test_windows_of_an_image_stay_with_their_client() -> None:
    model = hilora.inject(
        timm_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2,), num_heads=(1,)).double(),
        HiLoRAConfig(r=2),
    )
    hilora.set_slots(model, leaf=torch.tensor([1, 0]))
    randomise(model)
    x = images(4, 56, dtype=torch.float64)
    torch.testing.assert_close(model(x), clients(model, {"leaf": [1, 0]}, x)[0], rtol=1e-10, atol=1e-10)


def test_set_slots_adds_fresh_adapters_and_keeps_the_old() -> None:
    model = injected()
    before = output(model, images(2))
    old = banks(model)[0].B("leaf").detach().clone()
    hilora.set_slots(model, leaf=torch.tensor([0, 3]), root=torch.tensor([0, 0]))
    leaf = banks(model)[0].B("leaf").detach()
    assert leaf.shape[1] == 4
    assert torch.equal(leaf[:, :1], old)
    assert not leaf[:, 1:].any()
    torch.testing.assert_close(output(model, images(2))[:1], before[:1])
    assert not torch.allclose(output(model, images(2))[1], before[1])
    hilora.set_slots(model, leaf=torch.tensor([0, 0]))
    torch.testing.assert_close(output(model, images(2)), before)


def test_slots_take_lists_and_can_be_taken_back() -> None:
    model = injected()
    before = output(model, images(2))
    hilora.set_slots(model, leaf=[-1, 0])  # type: ignore[arg-type]
    assert not torch.allclose(output(model, images(2))[0], before[0])
    hilora.set_slots(model, leaf=None)
    assert torch.equal(output(model, images(2)), before)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"lief": torch.tensor([0])}, "unknown tier 'lief'"),
        ({"leaf": torch.tensor([0.0])}, r"slots of leaf must be integers \[G\], got torch.float32 \(1,\)"),
        ({"leaf": torch.tensor([True])}, "got torch.bool"),
        ({"leaf": torch.tensor(0)}, r"got torch.int64 \(\)"),
        ({"leaf": torch.tensor([[0]])}, r"got torch.int64 \(1, 1\)"),
        ({"leaf": torch.tensor([], dtype=torch.long)}, r"got torch.int64 \(0,\)"),
        ({"leaf": torch.tensor([0, -2])}, r"slots of leaf must be -1 \(none\) or more, got -2"),
        ({"leaf": torch.tensor([5, 6, 7])}, r"the same number of groups, got \{'cluster': 2, 'leaf': 3\}"),
        ({"root": torch.tensor([9]), "leaf": torch.tensor([9, 9])}, "the same number of groups"),
    ],
)
def test_slots_that_cannot_be_are_errors_and_change_nothing(slots: dict[str, Tensor], message: str) -> None:
    model = injected()
    hilora.set_slots(model, cluster=torch.tensor([1, 0]))
    before, tables = copy.deepcopy(model.state_dict()), copy.deepcopy([bank.slots for bank in banks(model)])
    with pytest.raises(ValueError, match=message):
        hilora.set_slots(model, **slots)
    assert same(dict(model.state_dict()), dict(before))
    assert same([bank.slots for bank in banks(model)], tables)
