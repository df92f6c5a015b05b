from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hilora.models.quick import LastBlock, QuickAttention, QuickLinear, hasten


def vit(fused: bool, **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**shape | options).double()
    for module in model.modules():
        if isinstance(module, timm.layers.Attention):
            module.fused_attn = fused
    return model


def features_and_gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    features = model(images)
    return [features, *torch.autograd.grad(features.sin().sum(), [images, *model.parameters()])]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"reg_tokens": 2, "init_values": 0.3},
        {"qk_norm": True},
        {"proj_drop_rate": 0.0, "pre_norm": True, "fc_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 3])
def test_features_and_gradients_stay_the_same(count: int, options: dict[str, Any], fused: bool) -> None:
    plain, quick = vit(fused, **options), vit(fused, **options)
    hasten(quick)
    images = torch.randn(count, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    for want, got in zip(*(features_and_gradients(model, images) for model in (plain, quick)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_frozen_vit_stays_the_same() -> None:
    plain, quick = vit(False).float(), vit(False).float()
    hasten(quick)
    quick.requires_grad_(False)
    assert sum(type(module) is QuickLinear for module in quick.modules()) == 3 * 4
    images = torch.randn(30, 3, 32, 32, requires_grad=True)
    for second in (False, True):
        found = []
        for model in (plain, quick):
            features = model(images)
            (first,) = torch.autograd.grad(features.sin().sum(), images, create_graph=second)
            found.append([features, first, *(torch.autograd.grad(first.cos().sum(), images) if second else ())])
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_what_is_hastened() -> None:
    def kinds(**options: Any) -> tuple[int, int]:
        model = vit(False, **options)
        hasten(model)
        found = list(model.modules())
        return tuple(sum(isinstance(one, kind) for one in found) for kind in (QuickAttention, LastBlock))  # type: ignore[return-value]

    assert kinds() == (3, 1)
    assert kinds(global_pool="avg") == (3, 0), "all tokens are pooled"
    assert kinds(qk_norm=True) == (0, 0)


def test_the_last_block_gives_the_class_token_alone() -> None:
    model = vit(False)
    hasten(model)
    assert model.forward_features(torch.zeros(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 1, 24)


def test_dropout_and_masks_are_timm_s() -> None:
    plain, quick = vit(False, attn_drop_rate=0.5), vit(False, attn_drop_rate=0.5)
    hasten(quick)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for mask in (None, torch.rand(17, 17) < 0.7):
        drawn = []
        for model in (plain, quick):
            torch.manual_seed(1)
            drawn.append(model(images, attn_mask=mask))
        torch.testing.assert_close(*drawn)


def test_gradients_can_be_differentiated_once_more() -> None:
    def second(model: nn.Module) -> Tensor:
        (first,) = torch.autograd.grad(model(images).sin().sum(), images, create_graph=True)
        return torch.autograd.grad(first.square().sum(), images)[0]

    plain, quick = vit(False), vit(False)
    hasten(quick)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(second(quick), second(plain), rtol=1e-8, atol=1e-8)
