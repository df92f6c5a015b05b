from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

import hilora
from hilora import HiLoRAConfig, TieredLoRALinear
from hilora.adapters.injection import banks
from tests.helpers import CONFIG, TIERS, random, randomise, same


def make(config: HiLoRAConfig = CONFIG, dtype: torch.dtype = torch.float32, bias: bool = True) -> TieredLoRALinear:
    """A layer 7 → 5 with adapters that do something."""
    torch.manual_seed(0)
    layer = TieredLoRALinear(nn.Linear(7, 5, bias=bias, dtype=dtype), config)
    randomise(layer)
    return layer


def dense(layer: TieredLoRALinear, slots: dict[str, int] | None = None) -> Tensor:
    """W + Σ scale B A in fp64."""
    weight = layer.weight.double()
    (bank,) = banks(layer)
    for tier in bank.tiers:
        slot = (slots or {}).get(tier, 0)
        if slot >= 0:
            weight = weight + bank.config.scale(tier) * bank.B(tier)[0, slot].double() @ bank.A(tier)[0, slot].double()
    return weight


def test_the_layer_of_the_readme() -> None:
    base = nn.Linear(768, 768)
    layer = TieredLoRALinear(base, r=8, lora_alpha=16)
    x = torch.randn(4, 768)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert torch.equal(layer(x), base(x))
    assert {tier: tuple(A.shape) for tier, A in layer.lora_A.items()} == dict.fromkeys(TIERS, (8, 768))
    assert {tier: tuple(B.shape) for tier, B in layer.lora_B.items()} == dict.fromkeys(TIERS, (768, 8))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A.root", "lora_B.root"]


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_that_of_the_dense_weight(shape: tuple[int, ...], bias: bool) -> None:
    layer = make(dtype=torch.float64, bias=bias)
    x = random(*shape, dtype=torch.float64).requires_grad_()
    y, expected = layer(x), nn.functional.linear(x, dense(layer), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    got, want = (torch.autograd.grad((value**2).sum(), leaves, allow_unused=True) for value in (y, expected))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_inputs_need_not_be_contiguous() -> None:
    layer = make()
    x = random(7, 4, 3).permute(1, 2, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    hilora.set_slots(layer, leaf=torch.tensor([0, 1]))
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("shape", [(6, 7), (6, 4, 7), (6, 2, 2, 7), (0, 4, 7), (3, 1, 7)])
def test_rows_in_equal_groups_use_their_slots(shape: tuple[int, ...]) -> None:
    layer = make(dtype=torch.float64)
    hilora.set_slots(layer, cluster=torch.tensor([1, -1, 1]), leaf=torch.tensor([0, 2, 3]))
    randomise(layer, seed=1)
    x = random(*shape, dtype=torch.float64)
    slots = [{"cluster": 1, "leaf": 0}, {"cluster": -1, "leaf": 2}, {"cluster": 1, "leaf": 3}]
    groups = zip(x.chunk(3), slots, strict=True) if len(x) else ()
    expected = [nn.functional.linear(rows, dense(layer, slot), layer.bias) for rows, slot in groups]
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    if expected:
        torch.testing.assert_close(y, torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_equal_groups_are_an_error() -> None:
    layer = make()
    hilora.set_slots(layer, leaf=torch.tensor([0, 1, 2]))
    for shape in [(4, 7), (2, 3, 7), (7,)]:
        with pytest.raises(ValueError, match=r"the rows of x \(.*\) are not 3 equal groups, as the slots say"):
            layer(random(*shape))


def test_several_adapters_need_slots() -> None:
    layer = make(HiLoRAConfig(r=2, slots={"root": 1, "cluster": 2, "leaf": 3}))
    with pytest.raises(ValueError, match=r"tier 'cluster' has 2 adapters: say which to use by hilora\.set_slots"):
        layer(random(4, 7))
    hilora.set_slots(layer, cluster=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="tier 'leaf' has 3 adapters"):
        layer(random(4, 7))
    hilora.set_slots(layer, leaf=torch.tensor([2, -1]))
    assert layer(random(4, 7)).shape == (4, 5)


def test_a_tier_without_adapters_adds_nothing() -> None:
    layer = make(HiLoRAConfig(r=2, slots={"root": 1, "cluster": 0, "leaf": 0}), torch.float64)
    x = random(4, 7, dtype=torch.float64)
    expected = nn.functional.linear(x, dense(layer, {"cluster": -1, "leaf": -1}), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.delta_weight() + layer.weight, dense(layer, {"cluster": -1, "leaf": -1}), rtol=1e-12, atol=1e-12
    )


def test_only_the_active_tier_has_gradients() -> None:
    layer = make()
    for tier in TIERS:
        hilora.set_active_tier(layer, tier)
        layer.zero_grad()
        layer(random(4, 7)).square().sum().backward()
        trained = [name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()]
        assert trained == [f"lora_A.{tier}", f"lora_B.{tier}"]


def test_dropout_spares_the_base_and_sleeps_in_eval_mode() -> None:
    layer = make(HiLoRAConfig(r=2, lora_dropout=0.5))
    x = random(10, 7)
    torch.manual_seed(0)
    full = layer.eval()(x)
    assert torch.equal(layer(x), full)
    layer.train()
    draws = torch.stack([layer(x) for _ in range(4000)]).detach()
    assert not torch.equal(draws[0], draws[1])
    spread = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - full).abs() <= 6 * spread).all()
    for tier in TIERS:
        nn.init.zeros_(layer.lora_B[tier])
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_autocast_computes_as_the_base_does_with_fp32_gradients() -> None:
    layer = make()
    x = random(4, 7)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        base = nn.functional.linear(x, layer.weight, layer.bias)
        y = layer(x)
    assert y.dtype == base.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    y.square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    assert layer.lora_A["root"].grad.any()


def test_a_bf16_layer_has_fp32_adapters() -> None:
    layer = make(dtype=torch.bfloat16)
    x = random(40, 7, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert {p.dtype for name, p in layer.named_parameters() if "lora_" in name} == {torch.float32}
    expected = nn.functional.linear(x.double(), dense(layer), layer.bias.double())
    assert (y.double() - expected).norm() < 0.01 * expected.norm()


def test_delta_weight_is_the_sum_of_the_tiers() -> None:
    layer = make()
    hilora.set_slots(layer, leaf=torch.tensor([3]))
    randomise(layer, seed=1)
    for slots in ({"leaf": 2}, {"leaf": 3, "cluster": 0}, {"leaf": -1}, {"root": -1, "cluster": -1, "leaf": -1}):
        delta = layer.delta_weight(slots)
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta.double(), dense(layer, slots) - layer.weight.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="tier 'leaf' has 4 adapters: say which, leaf=0"):
        layer.delta_weight()
    with pytest.raises(ValueError, match="unknown tier 'lief'"):
        layer.delta_weight({"lief": 0})
    for slot in (4, -2):
        with pytest.raises(IndexError, match=f"tier 'leaf' has 4 slots, there is no slot {slot}"):
            layer.delta_weight({"leaf": slot})


def test_factors_show_slots_and_projections_where_there_are_several() -> None:
    layer = make(HiLoRAConfig(r=2, slots={"root": 1, "cluster": 3, "leaf": 1}))
    assert {tier: tuple(A.shape) for tier, A in layer.lora_A.items()} == {
        "root": (2, 7),
        "cluster": (3, 2, 7),
        "leaf": (2, 7),
    }
    fused = nn.Sequential()
    fused.add_module("qkv", nn.Linear(7, 15))
    hilora.inject(fused, HiLoRAConfig(r=2), example_input=random(1, 7))
    assert fused.qkv.lora_B["root"].shape == (2, 5, 2)  # type: ignore[union-attr, index]


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced_forward() -> nn.Linear:
    linear = nn.Linear(7, 5)
    linear.forward = lambda x: x  # type: ignore[method-assign, assignment]
    return linear


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Conv2d(1, 1, 1), "expected a plain nn.Linear to adapt, got Conv2d"),
        (TieredLoRALinear(nn.Linear(7, 5)), "got TieredLoRALinear"),
        (Scaled(7, 5), "Scaled computes its output or its weight in its own way"),
        (replaced_forward(), "Linear computes its output"),
        (weight_norm(nn.Linear(7, 5)), "Linear computes its output or its weight"),
    ],
)
def test_only_plain_linear_layers_can_be_wrapped(base: nn.Module, message: str) -> None:
    flags = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(TypeError, match=message):
        TieredLoRALinear(base)
    assert [parameter.requires_grad for parameter in base.parameters()] == flags


def test_a_config_and_its_fields_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="give a config or its fields, not both: r, lora_alpha"):
        TieredLoRALinear(nn.Linear(7, 5), CONFIG, r=8, lora_alpha=16)


def test_hooks_and_mode_of_the_base_are_kept() -> None:
    base, seen = nn.Linear(7, 5).eval(), []
    handle = base.register_forward_hook(lambda *args: seen.append("after"))
    base.register_forward_pre_hook(lambda *args: seen.append("before"))
    layer = TieredLoRALinear(base, r=2)
    assert not layer.training
    layer(random(1, 7))
    handle.remove()
    layer(random(1, 7))
    assert seen == ["before", "after", "before"]


def test_a_copy_is_independent() -> None:
    layer = make()
    layer(random(4, 7)).sum().backward()
    other = copy.deepcopy(layer)
    before = layer(random(4, 7))
    assert torch.equal(other(random(4, 7)), before)
    randomise(other, seed=3)
    assert not torch.equal(other(random(4, 7)), before)
    assert torch.equal(layer(random(4, 7)), before)


def test_a_layer_says_what_it_is() -> None:
    assert "in_features=7, out_features=5, bias=True, tiers=('root', 'cluster', 'leaf'), r={'root': 3" in repr(make())


def test_state_dicts_of_equal_layers_fit() -> None:
    layer, other = make(), make()
    randomise(other, seed=5)
    other.load_state_dict(layer.state_dict())
    assert same(dict(other.state_dict()), dict(layer.state_dict()))
    assert torch.equal(other(random(4, 7)), layer(random(4, 7)))
