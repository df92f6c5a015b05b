from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig
from hilora.adapters.injection import banks
from tests.helpers import CONFIG, images, injected, output, random, randomise, same, snapshot, vit

EVERYTHING = HiLoRAConfig(r=3, target_modules=("q", "v", "proj", "fc1", "fc2"), lora_dropout=0.5)


def with_clients(config: HiLoRAConfig = CONFIG, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """A model with 2 cluster and 6 leaf adapters."""
    model = injected(config).to(dtype)
    hilora.set_slots(model, cluster=torch.tensor([1, 0]), leaf=torch.tensor([5, 0]))
    randomise(model, seed=3)
    return model


def predictions(model: nn.Module, slots: dict[str, int], x: Tensor) -> Tensor:
    """Of an injected model in which all rows use these slots."""
    hilora.set_slots(model, **{tier: torch.tensor([slot]) for tier, slot in slots.items()})
    y: Tensor = model(x)
    return y.detach()


@pytest.mark.parametrize("slots", [{"cluster": 0, "leaf": 5}, {"cluster": -1, "leaf": 2}, {"cluster": 1, "leaf": -1}])
@pytest.mark.parametrize("config", [CONFIG, EVERYTHING], ids=["q and v", "everything"])
def test_a_merged_model_predicts_the_same(config: HiLoRAConfig, slots: dict[str, int]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        model = with_clients(config, dtype)
        x = images(4, dtype=dtype)
        expected = predictions(model, slots, x)
        assert hilora.merge(model, **slots) is model
        torch.testing.assert_close(model(x).detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("held", [False, True])
def test_what_lies_beyond_a_rank_is_not_merged(held: bool) -> None:
    model, x = injected(EVERYTHING), images(4)
    for bank in banks(model):
        A, B, rank = bank.A("leaf").detach(), bank.B("leaf").detach(), torch.tensor([2])
        if held:
            bank.hold("leaf", A, B, None, rank.int(), torch.tensor([1.5]))
        else:
            bank.assign("leaf", A, B, rank)
    expected = output(model, x)
    hilora.merge(model)
    torch.testing.assert_close(output(model, x), expected, rtol=2e-5, atol=2e-5)


def test_a_merged_model_is_a_plain_one() -> None:
    plain, model = vit(), injected()
    model.train()
    hilora.merge(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    assert model.training
    assert model.blocks[0].attn.qkv.training
    assert not model.blocks[0].attn.qkv.weight.requires_grad
    plain.load_state_dict(model.state_dict())
    model.eval()
    assert torch.equal(plain(images(2)), model(images(2)))


def test_only_the_adapted_weights_change() -> None:
    plain, model = vit(), injected()
    hilora.merge(model)
    changed = [n for n, value in model.state_dict().items() if not torch.equal(value, plain.state_dict()[n])]
    assert changed == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    delta = model.blocks[0].attn.qkv.weight - plain.blocks[0].attn.qkv.weight
    assert not delta[24:48].any(), "k is not adapted"
    assert torch.linalg.matrix_rank(delta[:24].double(), rtol=1e-4) == 3 + 2 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_exact(dtype: torch.dtype) -> None:
    model = injected()
    model.blocks.to(dtype)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    before, objects = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    for _ in range(2):
        hilora.merge(model)
        assert hilora.unmerge(model) is model
        assert same(dict(model.state_dict()), dict(before))
    assert [id(parameter) for parameter in model.parameters()] == objects


def test_unmerging_gives_back_what_was_merged() -> None:
    model = with_clients()
    before = model(images(4))
    hilora.set_active_tier(model, "leaf")
    active = [name for name, p in model.named_parameters() if p.requires_grad]
    hilora.merge(model, cluster=0, leaf=5)
    model.train()
    hilora.unmerge(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.eval()(images(4)), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == active


def test_a_merged_model_can_move_and_come_back() -> None:
    model = injected()
    expected = model(images(2)).double()
    hilora.merge(model)
    model.double()
    hilora.unmerge(model)
    torch.testing.assert_close(model(images(2).double()), expected, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_of_a_merged_model_are_merged() -> None:
    model = injected()
    before = model(images(2)).detach()
    hilora.merge(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images(2)), model(images(2)))
        hilora.unmerge(other)
        assert torch.equal(other(images(2)), before)
    with pytest.raises(ValueError, match="merged"):
        banks(model)


def test_unloading_gives_the_model_before_injection() -> None:
    plain, model = vit(), injected()
    before = snapshot(plain)
    assert hilora.unload(model) is model
    after = snapshot(model)
    assert {name: value for name, (_, value) in after["state"].items()}.keys() == before["state"].keys()
    assert all(torch.equal(value, before["state"][name][1]) for name, (_, value) in after["state"].items())
    assert after["attributes"] == before["attributes"]
    assert after["hooks"] == before["hooks"]
    assert torch.equal(model(images(2)), plain(images(2)))
    hilora.inject(model, EVERYTHING)


def test_hooks_of_the_layers_survive() -> None:
    model, calls = vit(), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *args: calls.append(type(args[0]).__name__))
    hilora.inject(model, CONFIG)
    calls.clear()
    model(images(1))
    hilora.merge(model)
    model(images(1))
    hilora.unload(hilora.unmerge(model))
    model(images(1))
    assert calls == ["TieredLoRALinear", "Linear", "Linear"]


def test_a_tier_without_adapters_adds_nothing() -> None:
    model = injected(HiLoRAConfig(r=2, slots={"root": 1, "cluster": 0, "leaf": 0}))
    expected = model(images(2))
    hilora.merge(model)
    torch.testing.assert_close(model(images(2)), expected, rtol=1e-5, atol=1e-5)


def test_errors_change_nothing() -> None:
    model = with_clients()
    before = snapshot(model)
    wrong: list[tuple[dict[str, int], type[Exception], str]] = [
        ({"cluster": 0}, ValueError, "tier 'leaf' has 6 adapters: say which, leaf=0"),
        ({}, ValueError, "tier 'cluster' has 2 adapters"),
        ({"cluster": 0, "leaf": 0, "lief": 0}, ValueError, "unknown tier 'lief'"),
        ({"cluster": 0, "leaf": 6}, IndexError, "tier 'leaf' has 6 slots, there is no slot 6"),
        ({"cluster": -2, "leaf": 0}, IndexError, "there is no slot -2"),
    ]
    for slots, error, message in wrong:
        with pytest.raises(error, match=message):
            hilora.merge(model, **slots)
        assert same(snapshot(model), before)
    with pytest.raises(ValueError, match="the model is not merged"):
        hilora.unmerge(model)


def test_what_a_merged_model_cannot_do() -> None:
    model = injected()
    hilora.merge(model)
    before = snapshot(model)
    for function in (hilora.orthogonality_penalty, hilora.set_slots, lambda m: hilora.set_active_tier(m, "leaf")):
        with pytest.raises(
            ValueError, match=r"merged into the weights: take them out first, by hilora\.unmerge\(model\)"
        ):
            function(model)
    with pytest.raises(ValueError, match="has adapters already"):
        hilora.inject(model, CONFIG)
    assert same(snapshot(model), before)


def test_a_layer_by_itself_cannot_be_merged_in_place() -> None:
    layer = hilora.TieredLoRALinear(nn.Linear(7, 5), r=2)
    randomise(layer)
    for function in (hilora.merge, hilora.unload):
        with pytest.raises(ValueError, match=r"by itself cannot be changed in place: use its delta_weight\(\)"):
            function(layer)
    x = random(3, 7)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias))


def test_a_shared_layer_stays_shared() -> None:
    linear = nn.Linear(7, 7)
    model = nn.ModuleDict({"a": nn.Sequential(linear), "b": nn.Sequential(linear)})
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=("a.0",)))
    hilora.merge(model)
    assert model["a"][0] is model["b"][0]  # type: ignore[index]
    hilora.unload(hilora.unmerge(model))
    assert model["a"][0] is model["b"][0]  # type: ignore[index]
    assert model["a"][0].weight is linear.weight  # type: ignore[index]


def test_merging_for_good_leaves_a_plain_model() -> None:
    for slots in ({"cluster": 0, "leaf": 5}, {"cluster": 1, "leaf": -1}):
        model, plain = with_clients(), vit()
        expected = predictions(copy.deepcopy(model), slots, images(4))
        assert hilora.merge_and_unload(model, **slots) is model
        assert snapshot(model)["attributes"] == snapshot(plain)["attributes"]
        assert snapshot(model)["hooks"] == snapshot(plain)["hooks"]
        torch.testing.assert_close(model(images(4)).detach(), expected, rtol=2e-5, atol=2e-5)
        hilora.inject(model, CONFIG)
    before = snapshot(model := with_clients())
    with pytest.raises(ValueError, match="tier 'cluster' has 2 adapters"):
        hilora.merge_and_unload(model)
    assert same(snapshot(model), before)


def test_a_merged_model_can_be_unloaded_with_what_is_merged() -> None:
    for finish in (hilora.unload, hilora.merge_and_unload):
        model = injected()
        expected = hilora.merge(model)(images(2)).detach()
        finish(model)
        assert torch.equal(model(images(2)).detach(), expected)
        assert snapshot(model)["attributes"] == snapshot(vit())["attributes"]
        with pytest.raises(ValueError, match="not merged"):
            hilora.unmerge(model)
        with pytest.raises(ValueError, match="has no adapters"):
            hilora.unload(model)


def test_another_client_can_be_merged_in_place_of_the_first() -> None:
    model = with_clients()
    other = copy.deepcopy(model)
    before = model(images(4)).detach()
    hilora.merge(model, cluster=0, leaf=5)
    hilora.merge(model, cluster=1, leaf=2)
    hilora.merge(other, cluster=1, leaf=2)
    assert torch.equal(model(images(4)), other(images(4)))
    with pytest.raises(IndexError, match="there is no slot 6"):
        hilora.merge(model, cluster=1, leaf=6)
    assert torch.equal(model(images(4)), other(images(4)))
    assert torch.equal(hilora.unmerge(model)(images(4)), before)
    model.double()
    hilora.merge(hilora.merge(model, cluster=0, leaf=0).float(), cluster=1, leaf=2)
    torch.testing.assert_close(model(images(4)), other(images(4)))


def test_disabled_adapters_are_as_if_they_were_not_there() -> None:
    model, plain = with_clients(), vit()
    before = model(images(4)).detach()
    with hilora.disable_adapters(model):
        assert torch.equal(model(images(4)), plain(images(4)))
        assert torch.equal(model(images(3)), plain(images(3))), "slots do not matter"
        with hilora.disable_adapters(model):
            pass
        assert torch.equal(model(images(4)), plain(images(4)))
    assert torch.equal(model(images(4)), before)
    with pytest.raises(RuntimeError, match="inside"), hilora.disable_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(model(images(4)), before)


def test_a_merged_model_is_without_its_adapters_inside_of_the_context() -> None:
    model, plain = injected(), vit()
    merged = hilora.merge(model)(images(2)).detach()
    before = snapshot(model)
    with hilora.disable_adapters(model):
        assert torch.equal(model(images(2)), plain(images(2)))
    assert same(snapshot(model), before)
    assert torch.equal(model(images(2)), merged)
    hilora.unmerge(model)
    with pytest.raises(ValueError, match="has no adapters"), hilora.disable_adapters(plain):
        pass


def test_tiers_can_have_any_name() -> None:
    """Also that of a parameter of the functions that take tiers as keywords."""
    names = ("model", "slots", "self", "tier")
    model = injected(HiLoRAConfig(r=2, tiers=names))
    hilora.set_slots(model, model=torch.tensor([0, 1]), slots=torch.tensor([1, 0]))
    randomise(model)
    assert hilora.orthogonality_penalty(model, gamma_model=0.5).shape == ()
    hilora.set_active_tier(model, "model")
    y = model(images(4)).detach()
    hilora.merge(model, model=1, slots=0, self=0, tier=0)
    torch.testing.assert_close(model(images(4))[2:].detach(), y[2:], rtol=1e-4, atol=1e-4)
    hilora.merge_and_unload(model, model=0, slots=1)
    torch.testing.assert_close(model(images(4))[:2].detach(), y[:2], rtol=1e-4, atol=1e-4)
