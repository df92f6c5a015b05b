"""Put adapters into a model, choose the tier in training and each client's adapters, merge them into the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .bank import AdapterBank
from .callcheck import UncalledLayerError, check_calls
from .config import HiLoRAConfig
from .layers import Projection, TieredLoRALinear
from .targets import Target, find_targets


def banks(model: nn.Module) -> list[AdapterBank]:
    """The adapters in a model: one bank for each shape of projection.

    Raises:
        ValueError: if the model has none.
    """
    found = [module for module in model.modules() if isinstance(module, AdapterBank)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters: inject them first, by hilora.inject(model, config)")
    return found


def inject(model: nn.Module, config: HiLoRAConfig, example_input: Tensor | None = None) -> nn.Module:
    """Put adapters into a model, in place; its outputs do not change yet.

    Everything but the first tier, and a ViT's classifier head, is frozen. The bank of each shape of projection is
    registered with the first layer that uses it.

    Args:
        model: a ViT of timm, transformers or torchvision, or any module that contains what the targets name.
        config: the adapters.
        example_input: an input to check with that the model calls each adapted layer. ViTs need none. Other models
            are checked in their first forward pass.

    Returns:
        The model.

    Raises:
        ValueError: if a target finds nothing, the model has adapters already, or (`UncalledLayerError`) it never calls
            an adapted layer, as ViTs that use the weight of `qkv` by itself. The model is then left as it was.
    """
    if any(isinstance(module, TieredLoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already")
    if isinstance(model, nn.Linear):
        raise ValueError("a single nn.Linear cannot be changed in place: wrap it, hilora.TieredLoRALinear(linear, ...)")
    targets = find_targets(model, config.target_modules)
    required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers = _layers(model, targets, config)
    by_original = {model.get_submodule(path): layer for path, layer in layers.items()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in by_original:
            _replace(model, path, by_original[module])  # type: ignore[index]
    try:
        check_calls(model, layers, example_input)
    except UncalledLayerError:
        unload(model)
        for parameter, flag in required_grad.items():
            parameter.requires_grad_(flag)
        raise
    model.__dict__["_hilora_fresh_head"] = {name: p.detach().clone() for name, p in head_parameters(model).items()}
    set_active_tier(model, config.tiers[0])
    return model


def _layers(model: nn.Module, targets: list[Target], config: HiLoRAConfig) -> dict[str, TieredLoRALinear]:
    """The adapted layers by path, on banks shared by all projections of one shape."""
    by_shape: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        width = target.columns[1]
        by_shape.setdefault((width, model.get_submodule(target.module).in_features), []).append(target)  # type: ignore[arg-type]
    projections: dict[str, list[Projection]] = {}
    owned: dict[str, list[AdapterBank]] = {}
    for shape, members in by_shape.items():
        weight: Tensor = model.get_submodule(members[0].module).weight  # type: ignore[assignment]
        bank = AdapterBank([target.path for target in members], config, weight.detach()[:1, :1].expand(shape))
        owned.setdefault(members[0].module, []).append(bank)
        for index, target in enumerate(members):
            projections.setdefault(target.module, []).append(Projection(bank, index, target.columns))
    layers = {}
    for path, parts in projections.items():
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear)
        layers[path] = TieredLoRALinear(base, config, parts)
        layers[path].banks.extend(owned.get(path, ()))
    return layers


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a ViT's classifier head, by name; none where the model has no head."""
    if hasattr(model, "get_classifier"):  # timm
        found = model.get_classifier()
        heads = found if isinstance(found, tuple) else (found,)
    else:  # transformers, torchvision, others
        heads = tuple(getattr(model, name) for name in ("classifier", "heads", "head") if hasattr(model, name))
    members = {id(parameter) for head in heads if isinstance(head, nn.Module) for parameter in head.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in members}


def set_active_tier(model: nn.Module, tier: str) -> None:
    """Train this tier, and a ViT's classifier head if it has one, and nothing else.

    Raises:
        ValueError: for a tier that the adapters do not have.
    """
    found = banks(model)
    for bank in found:
        bank.config.rank(tier)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for bank in found:
        bank.activate(tier)
    for parameter in head_parameters(model).values():
        parameter.requires_grad_(True)


def set_slots(model: nn.Module, **slots: Tensor | None) -> None:
    """Say which adapter of each tier a client uses, where a batch holds several clients.

    The rows of a batch are in G equal groups, one a client. Adapters that a tier does not have yet are added, fresh.

    Args:
        model: a model with adapters.
        slots: for each tier named, integers `[G]`, -1 for no adapter of that tier; or None: all use the only one.

    Raises:
        ValueError: for unknown tiers, or tables of different lengths.
    """
    tables = {tier: None if slot is None else torch.as_tensor(slot) for tier, slot in slots.items()}
    found = banks(model)
    for bank in found:
        for tier, table in tables.items():
            bank.config.rank(tier)
            if table is not None and (table.dim() != 1 or table.is_floating_point() or not len(table)):
                raise ValueError(f"slots of {tier} must be integers [G], got {table.dtype} {tuple(table.shape)}")
            if table is not None and int(table.min()) < -1:
                raise ValueError(f"slots of {tier} must be -1 (none) or more, got {int(table.min())}")
        after = {**bank.slots, **tables}
        lengths = {tier: len(table) for tier, table in after.items() if table is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all tiers need slots for the same number of groups, got {lengths}")
    for bank in found:
        for tier, table in tables.items():
            if table is not None:
                bank.grow(tier, int(table.max()) + 1)
            bank.slots[tier] = None if table is None else table.to(bank.A[tier].device, torch.int32)


def merge(model: nn.Module, **slots: int) -> nn.Module:
    """Add adapters to the weights, in place: what is left is a plain model with the keys it had before injection.

    Args:
        model: a model with adapters.
        slots: which adapter of each tier to merge; the only one where a tier is not named.

    Returns:
        The model. `unmerge` gives the adapters back, and the weights to the bit.

    Raises:
        ValueError: for an unknown tier, or one of several adapters whose slot is not named.
        IndexError: for a slot that a tier does not have.
    """
    for bank in banks(model):
        for tier in slots:
            bank.config.rank(tier)
        for tier in bank.tiers:
            count = bank.A[tier].shape[1]
            if count > 1 and tier not in slots:
                raise ValueError(f"tier {tier!r} has {count} adapters: say which to merge, merge(model, {tier}=0)")
    layers = dict(_tiered_layers(model))
    merged = {}
    for layer in layers.values():
        weight = (layer.weight.detach() + layer.delta_weight(slots).detach()).to(layer.weight.dtype)
        merged[layer] = _plain(layer, nn.Parameter(weight, requires_grad=False))
    for path, layer in layers.items():
        _replace(model, path, merged[layer])
    model.__dict__["_hilora_layers"] = layers
    return model


def _tiered_layers(model: nn.Module) -> Iterator[tuple[str, TieredLoRALinear]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TieredLoRALinear):
            if not path:
                raise ValueError("a TieredLoRALinear by itself cannot be merged in place: use its delta_weight()")
            yield path, module


def _plain(layer: TieredLoRALinear, weight: nn.Parameter) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = weight, layer.bias
    return plain.train(layer.training)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, in place: adapters and weights are again what they were.

    Returns:
        The model.

    Raises:
        ValueError: if the model is not merged.
    """
    layers: dict[str, Any] = model.__dict__.get("_hilora_layers", {})
    if not layers:
        raise ValueError("the model is not merged")
    for path, layer in layers.items():
        plain = model.get_submodule(path)
        _replace(model, path, layer.to(plain.weight.device).train(plain.training))  # type: ignore[arg-type]
    del model.__dict__["_hilora_layers"]
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters out, in place, without merging them: the model has its own weights again, still frozen.

    Returns:
        The model.
    """
    banks(model)
    layers = dict(_tiered_layers(model))
    plain = {layer: _plain(layer, layer.weight) for layer in layers.values()}
    for path, layer in layers.items():
        _replace(model, path, plain[layer])
    return model
