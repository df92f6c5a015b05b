"""Whether DistributedDataParallel reduces the gradients of what is in training.

It reduces those of the parameters that required some when it was made. After a change of tier it would leave each
process with gradients of its own, without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hilora.adapters.torch_internals import hooks, reduced_by, wrapper_around
from hilora.errors import InvalidValueError

REDUCES = "_hilora_reduces"  # attribute of a wrapper: what is known to be reduced by it


def watch_reduction(model: nn.Module) -> None:
    """See in each forward pass inside of a DistributedDataParallel that it was made for what is in training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and check_reduction not in hooks(model):
        model.register_forward_pre_hook(check_reduction)


def check_reduction(model: nn.Module, args: Any) -> None:
    """A hook before a forward pass.

    Raises:
        ValueError: if gradients would not be synchronised.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    wrapper = wrapper_around()
    if wrapper is None:
        return
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if wrapper.__dict__.get(REDUCES) == trained.keys():
        return
    left_out = trained.keys() - {id(parameter) for parameter in reduced_by(wrapper)}
    wrapper.__dict__[REDUCES] = trained.keys() - left_out
    if left_out:
        first = next(name for key, name in trained.items() if key in left_out)
        raise InvalidValueError(
            f"DistributedDataParallel does not synchronise the gradients of {first} and {len(left_out) - 1} more: "
            "they did not train when it was made. Wrap the model anew after each hilora.set_active_tier"
        )
