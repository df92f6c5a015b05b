"""Which frozen weights adapters belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hilora.adapters.factors import whole
from hilora.adapters.injection import adapted_layers, head_parameters
from hilora.adapters.offload import brought
from hilora.errors import FileError
from hilora.models.registry import family_of
from hilora.models.wrappers import plain_path, unwrapped


def describe_base(model: nn.Module) -> dict[str, Any]:
    """A model's name, and a hash of its frozen weights: all parameters but adapters and the classifier head.

    Weights count to the precision of bfloat16, so that a model that was cast is still the same; in float16, which
    rounds otherwise, they have a hash of their own. Weights in 8 bits count as what these stand for.
    """
    model = unwrapped(model)
    digest, half = hashlib.blake2b(digest_size=16), False
    for name, weight in _frozen(model):
        half = half or weight.dtype == torch.float16
        digest.update(f"{name} {tuple(weight.shape)};".encode())
        if weight.is_floating_point() and weight.dtype != torch.float16:
            weight = weight.to(torch.bfloat16)
        digest.update(weight.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return {"name": family_of(model).title(model), "weights": digest.hexdigest(), "half": half}


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapted = adapted_layers(model, merged=True)
    own = {f"{path}.weight" if path else "weight": layer for path, layer in adapted.items()}
    adapters = {id(p) for layer in adapted.values() for factor in (layer.lora_A, layer.lora_B) for p in factor.values()}
    head = head_parameters(model)
    for path, parameter in model.named_parameters():
        name = plain_path(path, model)
        if id(parameter) not in adapters and name not in head:
            own_weight = own[name].frozen_weight if name in own else parameter
            yield name, whole(brought(model, own_weight).detach())


def check_base(model: nn.Module, saved: dict[str, Any], path: Any) -> None:
    """Raise a FileError unless a model has the frozen weights that the adapters of a file belong to, as far as that can
    be told."""
    if any(brought(model, parameter).is_meta for parameter in model.parameters()):
        return
    own = describe_base(model)
    if own["half"] == saved.get("half", False) and own["weights"] != saved.get("weights"):
        raise FileError(
            f"{path} has adapters of other frozen weights: of {saved.get('name')} ({saved.get('weights')}), the model "
            f"is {own['name']} ({own['weights']}). Load that model's weights first, or take the adapters all the same "
            "by load_adapters(..., check_base=False)"
        )
