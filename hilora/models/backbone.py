"""The frozen ViT that all clients share."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from hilora.errors import FileError, InvalidValueError
from hilora.models.registry import families

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
        ValueError: if there is no such model, or the weights do not fit it, or are not finite.
        RuntimeError: if the weights cannot be fetched.
    """
    family = next((family for family in families() if family.knows(name)), None)
    if family is None:
        raise InvalidValueError(f"there is no model {name!r}; there are {GLYPH_VIT} and {_like(name)}")
    backbone = family.load(name, weights, size)
    broken = [key for key, value in backbone.model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise FileError(
            f"the weights of {name if weights is None else weights} are not finite: {', '.join(broken):.200}"
        )
    return backbone


def _like(name: str) -> str:
    """Names of timm that resemble one."""
    import timm

    near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
    return f"timm's {', '.join(near)}" if near else "those of timm.list_models()"


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
