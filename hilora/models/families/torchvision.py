"""The ViTs of torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from hilora.models.registry import Family, pair


class Torchvision(Family):
    name = "torchvision"
    aliases: ClassVar[Mapping[str, Sequence[str]]] = {
        "qkv": ("to_qkv",),  # MaxViT
        "proj": ("attn_layer.1.merge",),
        "fc1": ("mlp.0", "mlp_layer.1"),
        "fc2": ("mlp.3", "mlp_layer.3"),
    }

    def owns(self, model: nn.Module) -> bool:
        return hasattr(model, "image_size")

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        return pair(model.image_size)
