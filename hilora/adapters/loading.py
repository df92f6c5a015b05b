"""Checkpoints of a plain model, loaded into one with adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from hilora.adapters.layers import TieredLoRALinear
from hilora.adapters.torch_internals import walk


def adapters_may_stay(model: nn.Module, keys: Any) -> None:
    """A hook after `load_state_dict`: a checkpoint without any adapters is whole, and those that are there stay. One
    that has some must have all."""
    layers = walk(model, TieredLoRALinear)
    own = tuple(f"{path}.lora_{half}.{tier}" for path, layer in layers for half in "AB" for tier in layer.config.tiers)
    missing = [key for key in keys.missing_keys if key.endswith(own)]
    if len(missing) == len(own):
        for key in missing:
            keys.missing_keys.remove(key)
