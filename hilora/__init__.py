"""Hierarchical low-rank adaptation (HiLoRA) of Vision Transformers for many clients at once."""

from .bank import AdapterBank
from .config import HiLoRAConfig
from .inject import inject, merge, set_active_tier, set_slots, unload, unmerge
from .layers import TieredLoRALinear
from .orthogonality import orthogonality_penalty
from .saving import load_adapters, save_adapters

__all__ = [
    "AdapterBank",
    "HiLoRAConfig",
    "TieredLoRALinear",
    "inject",
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
