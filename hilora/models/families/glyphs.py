"""The small ViT that comes with this package."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hilora.errors import InvalidValueError
from hilora.models.backbone import GLYPH_VIT, Backbone
from hilora.models.families.timm import described
from hilora.models.registry import Family


class Glyphs(Family):
    name = "glyphs"

    def owns(self, model: nn.Module) -> bool:
        return False  # it is one of timm's

    def knows(self, name: str) -> bool:
        return name == GLYPH_VIT

    def load(self, name: str, weights: Path | None, size: int | None) -> Backbone:
        from hilora.models.glyph_vit import glyph_vit

        if weights is not None or size not in (None, 32):
            raise InvalidValueError(
                f"{GLYPH_VIT} has weights of its own and takes 32 × 32 images: leave weights and size out"
            )
        return described(glyph_vit(0), name)
