"""Models inside of what tools wrap around them, and names without what the wrappers add to them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # by torch.compile, FSDP, checkpointing


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside of DistributedDataParallel, DataParallel, AveragedModel, torch.compile, FSDP; a model
    that is in none of them is itself."""
    while True:
        inserted = next((model._modules[name] for name in INSERTED if name in model._modules), None)
        if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif inserted is not None:
            model = inserted
        else:
            return model


def plain_path(path: str) -> str:
    """A path without the parts that wrappers of its modules add to it."""
    return ".".join(part for part in path.split(".") if part not in INSERTED)


def own_class(model: nn.Module) -> type[nn.Module]:
    """A model's class, without the one that `fully_shard` makes of it."""
    kinds = type(model).__mro__
    sharded = next((place for place, kind in enumerate(kinds) if kind.__name__ == "FSDPModule"), -1)
    own: type[nn.Module] = kinds[sharded + 1]
    return own
