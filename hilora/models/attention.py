"""PyTorch's own attention, whose q, k and v are one parameter: opened, that is the weight of a linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

PACKED = "in_proj"


class OpenAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose `in_proj_weight` is the weight of a layer `in_proj`, so that it can be adapted.
    Its state dict has the keys that it had."""

    in_proj: nn.Linear

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.in_proj.weight

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        found = super().state_dict(*args, prefix=prefix, **options)
        found[f"{prefix}in_proj_weight"] = found.pop(f"{prefix}{PACKED}.weight")
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}in_proj_weight" in state_dict:
            state_dict[f"{prefix}{PACKED}.weight"] = state_dict.pop(f"{prefix}in_proj_weight")
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_packed(module: nn.Module) -> bool:
    """Whether a module is an attention that can be opened."""
    return type(module) is nn.MultiheadAttention and module.in_proj_weight is not None


def open_attention(attention: nn.Module) -> None:
    """Let an attention have its packed projection as a layer."""
    weight = attention._parameters.pop("in_proj_weight")
    assert weight is not None
    attention.__class__ = OpenAttention
    packed = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    packed.weight, packed.training = weight, attention.training
    attention.add_module(PACKED, packed)


def close_attentions(model: nn.Module) -> None:
    """Let all attentions of a model be PyTorch's own again."""
    for module in list(model.modules()):
        if type(module) is OpenAttention:
            packed = module._modules.pop(PACKED)
            assert packed is not None
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
            weight, others = packed._parameters["weight"], dict(module._parameters)
            module._parameters.clear()
            module._parameters |= {"in_proj_weight": weight, **others}
