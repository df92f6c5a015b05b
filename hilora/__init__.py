"""Hierarchical low-rank adaptation (HiLoRA) of Vision Transformers for many clients at once."""

from . import aggregation, clustering, kernels
from .bank import AdapterBank
from .callcheck import UncalledLayerError
from .config import HiLoRAConfig
from .inject import inject, set_active_tier, set_slots
from .layers import TieredLoRALinear
from .merging import merge, unload, unmerge
from .orthogonality import orthogonality_penalty
from .saving import load_adapters, save_adapters

__all__ = [
    "AdapterBank",
    "HiLoRAConfig",
    "TieredLoRALinear",
    "UncalledLayerError",
    "aggregation",
    "clustering",
    "inject",
    "kernels",
    "load_adapters",
    "merge",
    "orthogonality_penalty",
    "save_adapters",
    "set_active_tier",
    "set_slots",
    "unload",
    "unmerge",
]
__version__ = "0.1.0"
