"""Layers with running statistics, which stay in eval mode under adapters.

In training mode, batch normalisation mixes the images of a batch, and so clients, and its statistics would change in a
backbone that is frozen and shared.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn


def freeze_statistics(model: nn.Module) -> None:
    """Keep modules with running statistics in eval mode, also after `model.train()`."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None and not _is_frozen(module):
            module.__dict__["train"] = partial(_note_mode, module, {"mode": module.training})
            module.training = False


def thaw_statistics(model: nn.Module) -> None:
    """Undo `freeze_statistics`: modules are in the mode that they would have been in."""
    for module in model.modules():
        if _is_frozen(module):
            module.training = module.__dict__.pop("train").args[1]["mode"]


def _is_frozen(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("train"), "func", None) is _note_mode


def _note_mode(module: nn.Module, wanted: dict[str, Any], mode: bool = True) -> nn.Module:
    """In place of `train`: remember the mode for later."""
    wanted["mode"] = mode
    return module
