"""Merge adapters into the weights of a model, take them out of it, or leave them aside for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hilora.adapters.callcheck import end_check
from hilora.adapters.factors import whole
from hilora.adapters.injection import FRESH_HEAD, MERGED, banks, replace
from hilora.adapters.layers import TieredLoRALinear, adopt
from hilora.adapters.loading import adapters_may_stay
from hilora.adapters.reduction import check_reduction
from hilora.adapters.statistics import freeze_statistics, thaw_statistics
from hilora.adapters.torch_internals import remove_hook, walk
from hilora.errors import InvalidValueError
from hilora.models.attention import close_attentions
from hilora.models.wrappers import unwrapped


@contextmanager
def disable_adapters(model: nn.Module, /) -> Iterator[None]:
    """Inside of this, a model with adapters, also a merged one, computes as it did before they were injected; its
    classifier head stays the trained one.

    Raises:
        ValueError: if the model has no adapters.
    """
    found, model = banks(model, merged=True), unwrapped(model)
    aside: dict[str, TieredLoRALinear] = model.__dict__.get(MERGED, {})
    plain = {path: model.get_submodule(path) for path in aside}
    before = [bank.shared.disabled for bank in found]
    try:
        for bank in found:
            bank.shared.disabled = True
        for path, layer in aside.items():
            replace(model, path, alike(layer, plain[path]))
        yield
    finally:
        for path, module in plain.items():
            replace(model, path, module)
        for bank, was in zip(found, before, strict=True):
            bank.shared.disabled = was


def alike(layer: TieredLoRALinear, plain: Any) -> TieredLoRALinear:
    """A layer in the dtype, on the device and in the mode of the plain one that was in its place."""
    if layer.frozen_weight.dtype != plain.weight.dtype:
        layer.to(plain.weight.dtype)
    return layer.to(plain.weight.device).train(plain.training)


@torch.inference_mode(False)
def merge(model: nn.Module, /, **slots: int) -> nn.Module:
    """Add adapters to the weights, in place: what is left is a plain model with the keys it had before injection.

    Args:
        model: a model with adapters; a merged one has others merged into its former weights.
        slots: which adapter of each tier to merge, -1 for none; the only one where a tier is not named.

    Returns:
        The model. It keeps the adapters and weights aside, for `unmerge`; its `state_dict` is that of a plain model.
        Where weights were quantised, the merged ones are not.

    Raises:
        ValueError: for an unknown tier, one of several adapters whose slot is not named, or a model that has no
            adapters.
        IndexError: for a slot that a tier does not have.
            After any error the model is as it was.
    """
    given, model = model, unwrapped(model)
    banks(model, merged=True)
    again = MERGED in model.__dict__
    layers = _tiered_layers(model)
    weights = {
        layer: (weight + layer.delta_weight(slots).detach().view_as(weight)).to(layer.frozen_weight.dtype)
        for layer, weight in ((layer, whole(layer.frozen_weight.detach())) for layer in layers.values())
    }
    if not again:
        end_check(model)
        plain = {layer: _plain(layer, computed=False) for layer in weights}
        for path, layer in layers.items():
            replace(model, path, plain[layer])
        thaw_statistics(model)
        model.__dict__[MERGED] = layers
    for path, layer in layers.items():
        module: Any = model.get_submodule(path)
        value = weights[layer].to(module.weight.device, module.weight.dtype)
        module.weight = nn.Parameter(value, requires_grad=False)
    return given


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, in place: adapters and weights are again what they were, to the bit.

    Returns:
        The model.

    Raises:
        ValueError: if the model is not merged.
    """
    given, model = model, unwrapped(model)
    layers: dict[str, TieredLoRALinear] | None = model.__dict__.get(MERGED)
    if layers is None:
        raise InvalidValueError("the model is not merged")
    for path, layer in layers.items():
        replace(model, path, alike(layer, model.get_submodule(path)))
    del model.__dict__[MERGED]
    freeze_statistics(model)
    return given


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters out, in place: the model has its own weights again, still frozen; or, where they are merged,
    the merged ones for good.

    Returns:
        The model.

    Raises:
        ValueError: if the model has no adapters.
    """
    given, model = model, unwrapped(model)
    banks(model, merged=True)
    if model.__dict__.pop(MERGED, None) is None:
        layers = _tiered_layers(model)
        end_check(model)
        plain = {layer: _plain(layer) for layer in layers.values()}
        for path, layer in layers.items():
            replace(model, path, plain[layer])
        thaw_statistics(model)
    close_attentions(model)
    model.__dict__.pop(FRESH_HEAD, None)
    remove_hook(model, check_reduction)
    remove_hook(model, adapters_may_stay)
    return given


def merge_and_unload(model: nn.Module, /, **slots: int) -> nn.Module:
    """Merge adapters into the weights and keep nothing aside: what is left is a plain model, in place.

    Args:
        model: a model with adapters; one that is merged stays as it is where no slots are named.
        slots: which adapter of each tier, as in `merge`.

    Returns:
        The model.

    Raises:
        ValueError: as `merge`. After an error the model is as it was.
    """
    if slots or MERGED not in unwrapped(model).__dict__:
        merge(model, **slots)
    end_check(unwrapped(model))
    return unload(model)


def _tiered_layers(model: nn.Module) -> dict[str, TieredLoRALinear]:
    aside: dict[str, TieredLoRALinear] | None = model.__dict__.get(MERGED)
    layers = dict(walk(model, TieredLoRALinear)) if aside is None else aside
    if "" in layers:
        raise InvalidValueError("a TieredLoRALinear by itself cannot be changed in place: use its delta_weight()")
    return layers


def _plain(layer: TieredLoRALinear, computed: bool = True) -> nn.Module:
    plain = layer.plain()
    adopt(plain, layer, computed)
    return plain
