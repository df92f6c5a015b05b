"""Layers whose weights accelerate brings and takes away again around each forward pass, as `device_map` leaves them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hilora.errors import InvalidValueError


def own_forward(module: nn.Module) -> Any:
    """A module's forward pass, without what accelerate's hook puts around it."""
    return module.__dict__.get("_old_forward", module.forward)


def take_over_offloading(module: nn.Module, other: nn.Module) -> None:
    """Let a module that has another one's weights have its hook of accelerate, too, if it has one."""
    if "_hf_hook" in other.__dict__:
        own, around = module.forward, other.forward
        assert isinstance(around, functools.partial)
        around = functools.update_wrapper(functools.partial(around.func, module), own)
        module.__dict__ |= {"_hf_hook": other._hf_hook, "_old_forward": own, "forward": around}


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a module computes with a weight, which may be elsewhere until then."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", [hook]):  # one, or several in a row
        if weight.is_meta and getattr(each, "execution_device", None) is not None:
            return torch.device(each.execution_device)
    return weight.device


def brought(model: nn.Module, parameter: Tensor) -> Tensor:
    """A parameter of a model; from where accelerate keeps it, if it has taken it away."""
    for module in model.modules() if parameter.is_meta else ():
        hook = module.__dict__.get("_hf_hook")
        for name, own in module._parameters.items():
            for each in getattr(hook, "hooks", [hook]) if own is parameter else ():
                if getattr(each, "weights_map", None) is not None:
                    kept: Tensor = each.weights_map[name]
                    return kept
    return parameter


def check_brought(module: nn.Module, parameter: Tensor | None, what: str) -> None:
    """Raise an InvalidValueError if accelerate has taken a parameter away."""
    if "_hf_hook" in module.__dict__ and parameter is not None and parameter.is_meta:
        raise InvalidValueError(
            f"the {what} are offloaded by accelerate, and here in forward passes alone: bring them back first, by "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
