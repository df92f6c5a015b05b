"""The ViTs of open_clip, and OpenAI's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from hilora.models.registry import Family


class OpenClip(Family):
    name = "open_clip"
    aliases: ClassVar[Mapping[str, Sequence[str]]] = {"fc1": ("mlp.c_fc",), "fc2": ("mlp.c_proj",)}

    def owns(self, model: nn.Module) -> bool:
        return False  # torchvision's attributes describe them as well
