"""What this package uses of PyTorch beyond its documented interface, in one place; tried on PyTorch 2.14.1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

M = TypeVar("M", bound=nn.Module)


def reshape_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter values of another shape; it stays the same object, without a gradient.

    By way of another dtype: nothing else resets autograd's node, which an old graph may keep alive, and which would
    sum gradients to the old shape.
    """
    parameter.data = parameter.new_empty(0, dtype=torch.half if parameter.dtype != torch.half else torch.float)
    parameter.data, parameter.grad = value, None


def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version


def in_transform() -> bool:
    """Whether torch.func differentiates or maps."""
    return bool(torch._C._are_functorch_transforms_active())


def walk(model: nn.Module, leaf: type[M]) -> Iterator[tuple[str, M]]:
    """The modules of a class with their paths, in the order of `model.named_modules()` but in a fifth of its time; a
    module that is at several paths comes at each of them, and what is inside of one is not looked into."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if isinstance(module, leaf):
            yield path, module
        else:
            prefix = f"{path}." if path else ""
            children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            stack += reversed(children)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile is around a module, or its own `compile` was called."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def hooks(module: nn.Module) -> list[object]:
    """The hooks that are called before and after a module's forward pass."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def remove_hook(module: nn.Module, function: object) -> None:
    """Take a function out of a module's hooks, whoever registered it."""
    for registered in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks):
        for key in [key for key, hook in registered.items() if hook is function]:
            del registered[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)


def take_over_hooks(module: nn.Module, other: nn.Module) -> None:
    """Let a module have all hooks of another one, the same dictionaries of them."""
    names = [name for name in other.__dict__ if "hook" in name and name != "_hf_hook"]
    module.__dict__.update({name: other.__dict__[name] for name in names})


def owns_weight(module: nn.Module) -> bool:
    """Whether `weight` is a parameter, and not computed from others, as parametrisations do."""
    return "weight" in module._parameters


def wrapper_around() -> nn.Module | None:
    """The DistributedDataParallel whose forward pass this is in, if any."""
    return DistributedDataParallel._active_ddp_module


def reduced_by(wrapper: nn.Module) -> list[Tensor]:
    """The parameters whose gradients a DistributedDataParallel reduces."""
    reducer: Any = wrapper.reducer
    return [parameter for bucket in reducer._get_zeros_like_grad_buckets() for parameter in bucket.parameters()]
