"""Models of several libraries, small and random."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from tests.helpers import random


@torch.no_grad()
def lively(model: Any) -> nn.Module:
    """A model without zeros that would hide what an adapter does: heads, layer scales."""
    for seed, parameter in enumerate(model.parameters()):
        parameter += 0.1 * random(*parameter.shape, seed=seed)
    assert isinstance(model, nn.Module)
    return model.eval()


def timm_model(name: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return lively(timm.create_model(name, pretrained=False, num_classes=5, **fields))


def transformers_vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return lively(transformers.ViTForImageClassification(config))


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return lively(torchvision.models.VisionTransformer(16, 8, 2, 2, 24, 48, num_classes=5))


class Net(nn.Module):
    """A user's own module: an encoder of PyTorch, and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 24)
        layer = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.extra = nn.ModuleDict({"embed": self.embed})
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(self.extra["embed"](x) + self.embed(x)).mean(1))
        return y


def net() -> nn.Module:
    torch.manual_seed(0)
    return lively(Net())


def mlp() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(24, 24), nn.GELU())
    return lively(nn.Sequential(nn.Linear(7, 24), nn.GELU(), inner, nn.Linear(24, 5)))


# a model, what to adapt, its input, the projections of each bank as (number, in, out)
