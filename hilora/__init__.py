"""Hierarchical low-rank adaptation (HiLoRA) of Vision Transformers for many clients at once."""

from hilora import aggregation, clustering, kernels
from hilora.adapters.bank import AdapterBank
from hilora.adapters.callcheck import UncalledLayerError
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.injection import inject, set_active_tier, set_slots
from hilora.adapters.io.native import load_adapters, save_adapters
from hilora.adapters.layers import TieredLoRALinear
from hilora.adapters.merging import merge, unload, unmerge
from hilora.adapters.orthogonality import orthogonality_penalty

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
