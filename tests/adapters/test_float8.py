"""Adapted layers whose frozen weight is kept in 8 bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import hilora
from hilora import TieredLoRALinear
from hilora.adapters.injection import adapted_layers
from hilora.adapters.io.base import describe_base
from hilora.kernels import quantized
from tests.helpers import CONFIG, images, injected, output, random, randomise, same, snapshot, vit

NARROW = replace(CONFIG, base_dtype="float8_e4m3fn")
E4M3 = torch.float8_e4m3fn


def as_wide(model: nn.Module) -> nn.Module:
    """A plain model with the weights that the 8 bits of another stand for."""
    wide: nn.Module = vit()
    for path, layer in adapted_layers(model).items():
        wide.get_submodule(path).weight = nn.Parameter(layer.frozen_weight)
    return wide


def test_adapted_layers_keep_8_bits_and_a_scale_a_row() -> None:
    plain, model = vit(), injected(NARROW)
    for path, layer in adapted_layers(model).items():
        weight = plain.get_submodule(path).weight
        assert layer.weight.dtype == E4M3
        assert not layer.weight.requires_grad
        assert layer.weight_scale is not None
        assert same([layer.weight.float(), layer.weight_scale], [v.float() for v in quantized(weight.bfloat16())])
        assert layer.frozen_weight.dtype == torch.float32
        assert ((layer.frozen_weight - weight).abs() <= weight.abs() / 15 + layer.weight_scale[:, None] / 500).all()
        assert layer.delta_weight().dtype == torch.float32
    others = {name: p for name, p in model.named_parameters() if p.dtype == E4M3}
    assert len(others) == len(adapted_layers(model)) == 2
    error = (output(model, images(4)) - output(injected(), images(4))).norm() / output(injected(), images(4)).norm()
    assert 1e-4 < error < 0.05


def test_adapters_are_trained_as_ever() -> None:
    model, reference = injected(NARROW), injected()
    x = images(4)
    for one in (model, reference):
        hilora.set_active_tier(one, "leaf")
        one(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted[name]).norm() < 0.15 * wanted[name].norm(), name


def test_several_clients_in_one_batch() -> None:
    model = injected(NARROW)
    hilora.set_slots(model, leaf=torch.tensor([1, 0]))
    randomise(model, seed=3)
    x = images(4)
    together = output(model, x)
    for group, slot in enumerate((1, 0)):
        hilora.set_slots(model, leaf=torch.tensor([slot]))
        torch.testing.assert_close(output(model, x[2 * group : 2 * group + 2]), together[2 * group : 2 * group + 2])


def test_merge_unmerge_disable_and_unload_give_what_the_8_bits_stand_for() -> None:
    model, x = injected(NARROW), images(2)
    before, wide = output(model, x), as_wide(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with hilora.disable_adapters(model):
        assert (output(model, x) - output(wide, x)).norm() < 0.1 * output(wide, x).norm()
    hilora.merge(model)
    assert model.state_dict().keys() == vit().state_dict().keys()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (output(model, x) - before).norm() < 0.1 * before.norm()
    hilora.unmerge(model)
    assert same(dict(model.state_dict()), state)
    hilora.unload(model)
    assert same(dict(model.state_dict()), dict(wide.state_dict()))


def test_a_cast_leaves_the_8_bits_and_their_scales_as_they_are() -> None:
    model = injected(NARROW)
    for layer in adapted_layers(model).values():
        weight, scale = layer.weight.clone(), layer.weight_scale
        casts = (torch.bfloat16, torch.float16, torch.float64, torch.float32)
        for dtype, by_type in product(casts, (False, True)):
            layer.type(dtype) if by_type else layer.to(dtype)
            assert same([layer.weight.float(), layer.weight_scale], [weight.float(), scale])
            assert layer.weight_scale is not None
            assert layer.weight_scale.dtype == torch.float32
            assert layer.weight.dtype == E4M3
            assert layer.frozen_weight.dtype == layer.lora_A["root"].dtype == dtype
            assert layer(random(3, 24, dtype=dtype)).dtype == dtype
        assert layer.to("meta").frozen_weight.is_meta


def test_copies_state_dicts_and_plain_weights() -> None:
    model, x = injected(NARROW), images(2)
    expected = output(model, x)
    assert torch.equal(output(copy.deepcopy(model), x), expected)
    other = injected(NARROW, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, x), expected)
    third = injected(NARROW, seed=2)
    third.load_state_dict(vit().state_dict(), strict=False)  # full weights, which are rounded as they come
    for path, layer in adapted_layers(third).items():
        assert torch.equal(layer.frozen_weight, adapted_layers(model)[path].frozen_weight)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_8_bits_are_not_taken_for_numbers(strict: bool, assign: bool) -> None:
    narrow, wide = injected(NARROW), injected(seed=1)
    before = {path: layer.weight.clone() for path, layer in adapted_layers(wide).items()}
    with pytest.raises(RuntimeError, match=r"qkv.weight is in 8 bits.*make the model with base_dtype='float8_e4m3fn'"):
        wide.load_state_dict(narrow.state_dict(), strict=strict, assign=assign)
    assert same({path: layer.weight for path, layer in adapted_layers(wide).items()}, before)
    other = injected(NARROW, seed=1)
    before = {path: layer.frozen_weight for path, layer in adapted_layers(other).items()}
    state = {name: value for name, value in narrow.state_dict().items() if not name.endswith("weight_scale")}
    with pytest.raises(RuntimeError, match=r"qkv.weight is in 8 bits.*load its weight_scale as well"):
        other.load_state_dict(state, strict=strict, assign=assign)
    assert same({path: layer.frozen_weight for path, layer in adapted_layers(other).items()}, before)


def test_files_of_adapters_say_it_and_have_no_base(tmp_path: Path) -> None:
    model, x, path = injected(NARROW), images(2), tmp_path / "adapters.safetensors"
    hilora.save_adapters(model, path)
    wide = injected()
    hilora.save_adapters(wide, tmp_path / "wide.safetensors")
    assert abs(path.stat().st_size - (tmp_path / "wide.safetensors").stat().st_size) < 200
    other = hilora.load_adapters(vit(), path)
    assert torch.equal(output(other, x), output(model, x))
    assert all(layer.config.base_dtype == "float8_e4m3fn" for layer in adapted_layers(other).values())
    assert (
        describe_base(
            vit(),
        )["weights"]
        != describe_base(model)["weights"]
    )
    with pytest.raises(ValueError, match="other frozen weights"):
        hilora.load_adapters(injected(), path)
    hilora.load_adapters(wide, path, check_base=False)


def test_a_model_that_was_cast_has_the_same_8_bits() -> None:
    model = vit().to(torch.bfloat16)
    hilora.inject(model, NARROW)
    assert describe_base(model)["weights"] == describe_base(injected(NARROW).to(torch.bfloat16))["weights"]
    assert describe_base(model)["weights"] == describe_base(injected(NARROW))["weights"]


def test_a_single_layer() -> None:
    base = nn.Linear(7, 5)
    layer = TieredLoRALinear(base, r=2, base_dtype="float8_e4m3fn")
    assert layer.weight.dtype == E4M3
    assert layer.bias is base.bias
    assert base.weight.dtype == torch.float32
    x = random(3, 7)
    assert (layer(x.float()) - base(x.float())).norm() < 0.1 * base(x.float()).norm()
    with pytest.raises(ValueError, match="base_dtype must be 'float8_e4m3fn' or None"):
        TieredLoRALinear(base, base_dtype="int8")


def test_a_layer_compiles_in_one_graph() -> None:
    layer = injected(NARROW).get_submodule("blocks.0.attn.qkv")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random(2, 3, 24, dtype=torch.float32)
    torch.testing.assert_close(compiled(x), layer(x))


def test_layers_without_weights_of_their_own_are_refused() -> None:
    with pytest.raises(TypeError, match="called and own their weight"):
        TieredLoRALinear(weight_norm(nn.Linear(7, 5)), NARROW)
    reads = timm.create_model("beit_base_patch16_224", embed_dim=24, depth=1, num_heads=2, img_size=32, num_classes=5)
    before = snapshot(reads)
    with pytest.raises(TypeError, match="read by the model"):
        hilora.inject(reads, NARROW)
    assert same(snapshot(reads), before)
    unknown = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5))
    config = replace(NARROW, target_modules=("0",), modules_to_save=("1",))
    with pytest.raises(TypeError, match="example_input"):
        hilora.inject(unknown, config)
    hilora.inject(unknown, config, example_input=random(2, 7, dtype=torch.float32))
    assert unknown[0].weight.dtype == E4M3
