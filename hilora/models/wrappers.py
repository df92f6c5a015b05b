"""Models inside of what tools wrap around them, and names without what the wrappers add to them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # by torch.compile, FSDP, checkpointing
AROUND = (DataParallel, DistributedDataParallel, AveragedModel)  # these call it `module`,
ELSEWHERE = ("timm.utils.model_ema", "deepspeed.")  # as do those that are defined here


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside of DistributedDataParallel, DataParallel, AveragedModel, timm's averages of weights,
    torch.compile, FSDP; a model that is in none of them is itself."""
    while (name := _inserted(model)) is not None:
        model = model.get_submodule(name)
    return model


def _inserted(model: nn.Module) -> str | None:
    """What a wrapper calls the model that it is around."""
    if isinstance(model, AROUND) or type(model).__module__.startswith(ELSEWHERE):
        return "module"
    return next((name for name in INSERTED if name in model._modules), None)


def plain_path(path: str, model: nn.Module | None = None) -> str:
    """A path without the parts that wrappers of its modules add to it.

    Args:
        path: of a module, or of a tensor.
        model: where it begins; where it is not known, what is called `module` stays.
    """
    at, kept = model, []
    for part in path.split("."):
        if part not in INSERTED and (at is None or part != _inserted(at)):
            kept.append(part)
        at = at._modules.get(part) if at is not None else None
    return ".".join(kept)


def own_class(model: nn.Module) -> type[nn.Module]:
    """A model's class, without the one that `fully_shard` makes of it."""
    kinds = type(model).__mro__
    sharded = next((place for place, kind in enumerate(kinds) if kind.__name__ == "FSDPModule"), -1)
    own: type[nn.Module] = kinds[sharded + 1]
    return own
