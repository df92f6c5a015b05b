"""Hierarchical low-rank adaptation (HiLoRA) of Vision Transformers for many clients at once."""

from hilora import aggregation, clustering, kernels
from hilora.adapters.bank import AdapterBank
from hilora.adapters.callcheck import MixedRowsError, UncalledLayerError
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.counting import ParameterCount, count_parameters, print_trainable_parameters
from hilora.adapters.injection import inject, set_active_tier, set_slots
from hilora.adapters.io.from_peft import import_peft
from hilora.adapters.io.native import load_adapters, save_adapters
from hilora.adapters.io.peft import export_peft
from hilora.adapters.io.state import get_adapters, set_adapters
from hilora.adapters.layers import TieredLoRALinear
from hilora.adapters.merging import disable_adapters, merge, merge_and_unload, unload, unmerge
from hilora.adapters.orthogonality import orthogonality_penalty
from hilora.adapters.table import AdapterTable
from hilora.errors import HiLoRAError
from hilora.models.targets import find_targets

__all__ = [
    "AdapterBank",
    "AdapterTable",
    "HiLoRAConfig",
    "HiLoRAError",
    "MixedRowsError",
    "ParameterCount",
    "TieredLoRALinear",
    "UncalledLayerError",
    "aggregation",
    "clustering",
    "count_parameters",
    "disable_adapters",
    "export_peft",
    "find_targets",
    "get_adapters",
    "import_peft",
    "inject",
    "kernels",
    "load_adapters",
    "merge",
    "merge_and_unload",
    "orthogonality_penalty",
    "print_trainable_parameters",
    "save_adapters",
    "set_active_tier",
    "set_adapters",
    "set_slots",
    "unload",
    "unmerge",
]
__version__ = "0.1.0"
