"""Adapters in 1 × 1 convolutions, and in layers that mix q, k and v head by head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig, TieredLoRALinear
from hilora.adapters.convolution import TieredLoRAConv2d
from hilora.adapters.injection import banks
from tests.helpers import TIERS, gradients, output, random, randomise, same
from tests.vits import lively


class Attention(nn.Module):
    """One layer, in its two forms."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        self.channels = 1 if convolution else -1
        self.qkv: nn.Module = nn.Conv2d(6, 12, 1) if convolution else nn.Linear(6, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x.movedim(1, self.channels)).movedim(self.channels, -1)
        features: Tensor = self.fc(y.mean((1, 2)).tanh())
        return features


def pair(**fields: Any) -> tuple[Any, Any]:
    """A model with a convolution, and one with the linear layer that computes the same; both adapted alike."""
    torch.manual_seed(0)
    convolution: Any = Attention(True)
    linear: Any = Attention(False)
    linear.load_state_dict(convolution.state_dict() | {"qkv.weight": convolution.qkv.weight.flatten(1)})
    given: dict[str, Any] = {"r": 2, "modules_to_save": ("fc",)} | fields
    config = HiLoRAConfig(**given)
    for model in (convolution, linear):
        hilora.inject(model, config, example_input=random(2, 6, 3, 4))
        randomise(model)
    return convolution, linear


@pytest.mark.parametrize(
    "slots", [{}, {"leaf": torch.tensor([1, 0])}, {"cluster": torch.tensor([0, 1]), "leaf": torch.tensor([-1, 2])}]
)
def test_a_convolution_is_the_linear_layer_at_each_pixel(slots: dict[str, Tensor]) -> None:
    found = []
    for model in pair():
        hilora.set_slots(model, **slots)
        randomise(model, seed=3)
        for tier in TIERS:
            hilora.set_active_tier(model, tier)
            model.zero_grad()
            x = random(4, 6, 3, 4).requires_grad_()
            y = model(x)
            y.sin().sum().backward()
            found.append([y.detach(), x.grad, *gradients(model)])
    for got, want in zip(found[:3], found[3:], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_its_weight_keeps_its_shape_and_its_layout() -> None:
    model, _ = pair()
    assert type(model.qkv) is TieredLoRAConv2d
    assert model.state_dict()["qkv.weight"].shape == (12, 6, 1, 1)
    x = random(2, 6, 3, 4)
    assert model.qkv(x).is_contiguous()
    assert model.qkv(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert model.qkv(x[0]).shape == (12, 3, 4), "without a batch"
    adapted = model.qkv(x)
    hilora.merge(model)
    assert isinstance(model.qkv, nn.Conv2d)
    torch.testing.assert_close(model.qkv(x), adapted, rtol=1e-5, atol=1e-5)
    hilora.unmerge(model)
    assert torch.equal(model.qkv(x), adapted)
    assert isinstance(hilora.unload(model).qkv, nn.Conv2d)


@pytest.mark.parametrize(
    "fields", [{"kernel_size": 3}, {"stride": 2}, {"groups": 2}, {"padding": 1}], ids=lambda fields: next(iter(fields))
)
def test_other_convolutions_are_refused_with_a_reason(fields: dict[str, Any]) -> None:
    model: Any = Attention(True)
    model.qkv = nn.Conv2d(**{"in_channels": 6, "out_channels": 12, "kernel_size": 1} | fields)
    for name in ("q", "qkv"):
        with pytest.raises(hilora.HiLoRAError, match="qkv is a convolution of more than a pixel"):
            hilora.inject(model, HiLoRAConfig(target_modules=(name,), modules_to_save=()))


def test_a_convolution_of_another_kind_is_refused() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = Attention(True)
    model.qkv = Own(6, 12, 1)
    with pytest.raises(TypeError, match=r"Own computes its output .* expected a plain nn.Conv2d"):
        hilora.inject(model, HiLoRAConfig(modules_to_save=()))
    assert type(model.qkv) is Own


def test_dropout_and_autocast() -> None:
    model, _ = pair(lora_dropout=0.5)
    x = random(2, 6, 3, 4)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.eval().qkv(x).dtype == torch.bfloat16


def test_all_linear_leaves_convolutions_out() -> None:
    model = Attention(True)
    targets = hilora.find_targets(model, "all-linear", modules_to_save=())
    assert [target.path for target in targets] == ["fc"]
    assert [target.path for target in hilora.find_targets(model, ["qkv"])] == ["qkv"]


def test_peft_and_back(tmp_path: Path) -> None:
    model, _ = pair(modules_to_save=())
    x = random(2, 6, 3, 4)
    wanted, plain = output(model, x), hilora.unload(pair(modules_to_save=())[0])
    hilora.export_peft(model, tmp_path)
    torch.testing.assert_close(output(peft.PeftModel.from_pretrained(plain, str(tmp_path)), x), wanted)
    other = hilora.unload(pair(modules_to_save=())[0])
    config = HiLoRAConfig(r=20, target_modules=("q", "v"), modules_to_save=())
    hilora.inject(other, config, example_input=x)
    hilora.import_peft(other, tmp_path, tier="leaf")
    torch.testing.assert_close(output(other, x), wanted)


class Heads(nn.Module):
    """An attention in which each head has a q and k of width 2 and a v of width 4, one head after the other."""

    key_dim, num_heads = 2, 3

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(12, 5)

    def split(self, x: Tensor) -> list[Tensor]:
        """q, k and v, the heads side by side."""
        each = self.qkv(x).unflatten(-1, (3, 8)).split([2, 2, 4], dim=-1)
        return [part.flatten(-2) for part in each]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v))
        return y


def heads(targets: tuple[str, ...] = ("q", "v")) -> Heads:
    torch.manual_seed(0)
    model = Heads()
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=targets, modules_to_save=()), example_input=random(2, 4, 6))
    return model


def test_slices_of_mixed_heads_are_adapted_by_themselves() -> None:
    x = random(2, 4, 6)
    for name, changed in (("q", (True, False, False)), ("k", (False, True, False)), ("v", (False, False, True))):
        model = heads((name,))
        before = model.split(x)
        randomise(model)
        assert tuple(not same(a, b) for a, b in zip(model.split(x), before, strict=True)) == changed


def test_projections_of_several_widths_share_a_layer(tmp_path: Path) -> None:
    model, x = heads(), random(2, 4, 6)
    assert [(bank.names, bank.out_features) for bank in banks(model)] == [(("q", "v"), 12)]
    before = model.split(x)
    randomise(model)
    layer: Any = model.qkv
    q, _, v = (got - was for got, was in zip(model.split(x), before, strict=True))
    scale = layer.config.scale("leaf")
    for index, (change, width) in enumerate(((q, 6), (v, 12))):
        A, B = (
            torch.stack([factor[tier].detach()[index] for tier in TIERS]) for factor in (layer.lora_A, layer.lora_B)
        )
        expected = scale * torch.einsum("trd,twr,bnd->bnw", A, B[:, :width], x)
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    grad = layer.lora_B["root"].grad
    assert grad[0, :6].any(1).all()
    assert not grad[0, 6:].any(), "q has no more rows"
    adapted = output(model, x)
    hilora.export_peft(model, tmp_path / "peft")
    hilora.save_adapters(model, tmp_path / "a")
    other = heads()
    hilora.load_adapters(other, tmp_path / "a")
    assert torch.equal(output(other, x), adapted)
    hilora.merge(model)
    torch.testing.assert_close(output(model, x), adapted)
    torch.manual_seed(0)
    torch.testing.assert_close(output(peft.PeftModel.from_pretrained(Heads(), str(tmp_path / "peft")), x), adapted)


def test_clients_share_a_batch_of_mixed_heads() -> None:
    model, x = heads(), random(4, 4, 6)
    hilora.set_slots(model, leaf=torch.tensor([0, 1]))
    randomise(model)
    together = output(model, x)
    for client in (0, 1):
        hilora.set_slots(model, leaf=torch.tensor([client]))
        rows = slice(2 * client, 2 * client + 2)
        torch.testing.assert_close(output(model, x[rows]), together[rows])


MIXED: dict[str, dict[str, Any]] = {
    "tiny_vit_5m_224": {"embed_dims": (16, 32, 32, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
    "levit_128s": {"embed_dim": (32, 48, 64), "depth": (1, 1, 1)},
    "levit_conv_128s": {"embed_dim": (32, 48, 64), "depth": (1, 1, 1)},
    "coatnet_0_224": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16},
    "efficientvit_b0": {},
}


def as_the_model_takes_it_apart(attention: Any, y: Any) -> Any:
    """q, k and v from the output of an attention's first layer."""
    y = y.movedim(1, -1) if y.dim() == 4 else y
    if hasattr(attention, "key_dim"):
        widths = [attention.key_dim, attention.key_dim, attention.val_dim]
        return y.unflatten(-1, (attention.num_heads, -1)).split(widths, -1)
    return y.unflatten(-1, (-1, 3 * (attention.dim_head if hasattr(attention, "dim_head") else attention.dim))).chunk(
        3, -1
    )


@pytest.mark.parametrize("name", MIXED)
def test_q_is_the_q_that_a_model_takes_apart(name: str) -> None:
    torch.manual_seed(0)
    model = lively(timm.create_model(name, pretrained=False, num_classes=5, **MIXED[name]))
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=("q",)))
    randomise(model)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, TieredLoRALinear) and ".qkv" in path}
    assert layers
    for path, layer in layers.items():
        at = path.removesuffix(".linear").removesuffix(".conv").rpartition(".")[0]
        x = random(2, layer.in_features, 3, 3)
        x = x if isinstance(layer, TieredLoRAConv2d) else x.flatten(2).mT
        adapted = layer(x)
        layer.shared.disabled = True
        before = as_the_model_takes_it_apart(model.get_submodule(at), layer(x))
        layer.shared.disabled = False
        after = as_the_model_takes_it_apart(model.get_submodule(at), adapted)
        assert [bool((a - b).abs().flatten(0, -2).amax(0).min() > 0) for a, b in zip(after, before, strict=True)] == [
            True,
            False,
            False,
        ]
        assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
