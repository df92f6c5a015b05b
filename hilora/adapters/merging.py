"""Merge adapters into the weights of a model, or take them out of it."""

from __future__ import annotations

from torch import nn

from hilora.adapters.callcheck import end_check
from hilora.adapters.injection import FRESH_HEAD, MERGED, banks, linear_at, replace
from hilora.adapters.layers import TieredLoRALinear, adopt


def merge(model: nn.Module, **slots: int) -> nn.Module:
    """Add adapters to the weights, in place: what is left is a plain model with the keys it had before injection.

    Args:
        model: a model with adapters.
        slots: which adapter of each tier to merge, -1 for none; the only one where a tier is not named.

    Returns:
        The model. It keeps the adapters and weights aside, for `unmerge`; its `state_dict` is that of a plain model.

    Raises:
        ValueError: for an unknown tier, one of several adapters whose slot is not named, or a model that has no
            adapters or is merged already.
        IndexError: for a slot that a tier does not have.
            After any error the model is as it was.
    """
    banks(model)
    layers = _tiered_layers(model)
    merged = {}
    for layer in layers.values():
        weight = (layer.weight.detach() + layer.delta_weight(slots).detach()).to(layer.weight.dtype)
        merged[layer] = _plain(layer)
        merged[layer].weight = nn.Parameter(weight, requires_grad=False)
    for path, layer in layers.items():
        replace(model, path, merged[layer])
    model.__dict__[MERGED] = layers
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, in place: adapters and weights are again what they were, to the bit.

    Returns:
        The model.

    Raises:
        ValueError: if the model is not merged.
    """
    layers: dict[str, TieredLoRALinear] | None = model.__dict__.get(MERGED)
    if layers is None:
        raise ValueError("the model is not merged")
    for path, layer in layers.items():
        plain = linear_at(model, path)
        if layer.weight.dtype != plain.weight.dtype:
            layer.to(plain.weight.dtype)
        replace(model, path, layer.to(plain.weight.device).train(plain.training))
    del model.__dict__[MERGED]
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters out, in place, without merging them: the model has its own weights again, still frozen.

    Returns:
        The model.

    Raises:
        ValueError: if the model has no adapters, or they are merged.
    """
    banks(model)
    layers = _tiered_layers(model)
    end_check(model)
    plain = {layer: _plain(layer) for layer in layers.values()}
    for path, layer in layers.items():
        replace(model, path, plain[layer])
    model.__dict__.pop(FRESH_HEAD, None)
    return model


def _tiered_layers(model: nn.Module) -> dict[str, TieredLoRALinear]:
    layers = {p: m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, TieredLoRALinear)}
    if "" in layers:
        raise ValueError("a TieredLoRALinear by itself cannot be changed in place: use its delta_weight()")
    return layers


def _plain(layer: TieredLoRALinear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    adopt(plain, layer)
    return plain
