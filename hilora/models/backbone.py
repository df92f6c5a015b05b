"""The frozen ViT that all clients share."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GLYPH_VIT = "glyph_vit"


@dataclass(frozen=True)
class Backbone:
    """A ViT without a head, and what it expects.

    Attributes:
        model: images `[n, 3, size, size]` → features `[n, features]`.
        name: what a run's summary calls it.
        size: height and width of the images.
        mean: of the channels of normalised images, `[3]`; `std` alike.
        features: D.
    """

    model: nn.Module
    name: str
    size: int
    mean: Tensor
    std: Tensor
    features: int


def load_backbone(name: str, weights: Path | None = None, size: int | None = None) -> Backbone:
    """A pretrained ViT of timm, or `glyph_vit`, the small one that comes with this package.

    Args:
        name: of a timm model, such as `vit_base_patch16_224.augreg_in21k`.
        weights: a local file of its weights (safetensors, or a checkpoint that torch can load), classifier included;
            None fetches them from the hub that timm uses.
        size: height and width of the images; None takes what it was trained for.

    Raises:
        FileNotFoundError: if there is no file of weights.
        ValueError: if there is no such model, or the weights do not fit it.
        RuntimeError: if the weights cannot be fetched.
    """
    if name == GLYPH_VIT:
        from hilora.models.glyph_vit import glyph_vit

        if weights is not None or size not in (None, 32):
            raise ValueError(f"{GLYPH_VIT} has weights of its own and takes 32 × 32 images: leave weights and size out")
        model: Any = glyph_vit(0)
        label = name
    else:
        model = _timm_model(name, weights, size)
        label = name if weights is None else f"{name} ({weights.name})"
    cfg, stem = model.pretrained_cfg, getattr(model, "patch_embed", None)
    takes = getattr(stem, "img_size", None) or cfg["input_size"][1:]
    return Backbone(model, label, takes[0], torch.tensor(cfg["mean"]), torch.tensor(cfg["std"]), model.num_features)


def _timm_model(name: str, weights: Path | None, size: int | None) -> Any:
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name!r}; it has {', '.join(near) or 'none with such a name'}")
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"there is no file of weights at {weights}")
    extra = {} if size is None else {"img_size": size}
    overlay = {} if weights is None else {"pretrained_cfg_overlay": {"state_dict": _read_weights(weights)}}
    timm.create_model(name, num_classes=0, **extra)  # whatever is wrong with the name or the size is not the weights
    try:
        # With its own classifier, since timm would otherwise load whatever fits and leave the rest random.
        model = timm.create_model(name, pretrained=True, **extra, **overlay)
    except Exception as error:  # hub clients raise errors of many kinds
        if weights is not None:
            raise ValueError(f"the weights in {weights} do not fit {name}: {error}") from error
        raise RuntimeError(
            f"the weights of {name} cannot be fetched ({type(error).__name__}): give a local file by --weights"
        ) from error
    model.reset_classifier(0)
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict, read without running anything that the file might say."""
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Tensor] = load_file(path)
            return state
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return dict(loaded.get("model", loaded.get("state_dict", loaded)))
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise ValueError(f"the weights in {path} cannot be read: {error}") from error


def tune_for_cpu() -> None:
    """Make training on a CPU about three times as fast, for this process; call it before a backbone is made.

    Attention is written out, since the fused kernel's backward is slow on CPUs; and glibc keeps freed memory, since
    every step would otherwise ask the system for hundreds of megabytes of fresh pages.
    """
    import timm

    timm.layers.set_fused_attn(False)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_mmap_max, m_trim_threshold = -4, -1
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
