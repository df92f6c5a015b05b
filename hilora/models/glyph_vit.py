"""A small ViT that needs no download, pretrained on generated glyphs (`hilora/federated/data/glyphs.py`)."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

SIZE = 32
WEIGHTS = Path(__file__).parent / "assets" / "glyph_vit.safetensors"


def new_glyph_vit(num_classes: int) -> VisionTransformer:
    """A ViT with random weights for images `[n, 3, 32, 32]`: 16 patches, width 96, 5 blocks of 3 heads."""
    model = VisionTransformer(
        img_size=SIZE,
        patch_size=8,
        embed_dim=96,
        depth=5,
        num_heads=3,
        mlp_ratio=3,
        num_classes=num_classes,
        class_token=False,
        global_pool="avg",
    )
    model.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "classifier": "head"}
    return model


def glyph_vit(num_classes: int) -> VisionTransformer:
    """The ViT of `new_glyph_vit` as `examples/pretrain_glyph_vit.py` trained it, with a fresh classifier.

    It expects images in [-1, 1] (mean and std 0.5, in its `pretrained_cfg` as timm has it).

    Raises:
        RuntimeError: if the shipped weights are not this model's.
    """
    model = new_glyph_vit(num_classes)
    head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()} | head)
    return model
