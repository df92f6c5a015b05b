"""Put adapters into a model, and choose the tier in training and each client's adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hilora.adapters.bank import AdapterBank
from hilora.adapters.callcheck import check_calls, end_check
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.layers import Projection, TieredLoRALinear
from hilora.models.targets import Target, find_targets

FRESH_HEAD = "_hilora_fresh_head"  # attributes of a model: its head before training,
MERGED = "_hilora_merged"  # and the layers that a merge has put aside


def banks(model: nn.Module) -> list[AdapterBank]:
    """The adapters in a model: one bank for each shape of projection.

    Raises:
        ValueError: if the model has none, or they are merged.
    """
    found: list[AdapterBank] = []
    walk = [model]
    while walk:  # as model.modules(), in a fifth of its time: a training step asks for the banks
        module = walk.pop()
        if isinstance(module, AdapterBank):
            if all(module is not other for other in found):
                found.append(module)
        else:
            walk += reversed([child for child in module._modules.values() if child is not None])
    if MERGED in model.__dict__:
        raise ValueError("the adapters are merged into the weights: take them out first, by hilora.unmerge(model)")
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters: inject them first, by hilora.inject(model, config)")
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters were injected, be they merged or not."""
    return MERGED in model.__dict__ or any(isinstance(module, TieredLoRALinear) for module in model.modules())


def inject(model: nn.Module, config: HiLoRAConfig, example_input: Tensor | None = None) -> nn.Module:
    """Put adapters into a model, in place; its outputs do not change yet.

    Everything but the first tier, and a ViT's classifier head, is frozen. The bank of each shape of projection is
    registered with the first layer that uses it. Fresh adapters are drawn from torch's global random stream of the CPU,
    also for a model on another device.

    Args:
        model: a ViT of timm, transformers or torchvision, or any module that contains what the targets name.
        config: the adapters.
        example_input: an input to check with that the model calls each adapted layer. ViTs need none. Other models
            are checked in their first forward pass.

    Returns:
        The model.

    Raises:
        ValueError: if a target finds nothing, the model has adapters already, or (`UncalledLayerError`) it never calls
            an adapted layer, as ViTs that use the weight of `qkv` by itself.
        TypeError: if a target computes something else than an `nn.Linear`.
            After any error the model is as it was.
    """
    if has_adapters(model):
        raise ValueError("the model has adapters already: take them out first, by hilora.unload(model)")
    if isinstance(model, nn.Linear):
        raise ValueError("a single nn.Linear cannot be changed in place: wrap it, hilora.TieredLoRALinear(linear, ...)")
    targets = find_targets(model, config.target_modules)
    with restored_on_error(model):
        layers = _layers(model, targets, config)
        by_original = {model.get_submodule(path): layer for path, layer in layers.items()}
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if module in by_original:
                replace(model, path, by_original[module])
        check_calls(model, layers, example_input)
        model.__dict__[FRESH_HEAD] = {name: p.detach().clone() for name, p in head_parameters(model).items()}
        set_active_tier(model, config.tiers[0])
    return model


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put a model without adapters back as it was, if the block raises an error."""
    linears = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        end_check(model)
        for path, linear in linears:
            replace(model, path, linear)
        for parameter, flag in required_grad:
            parameter.requires_grad_(flag)
        model.__dict__.pop(FRESH_HEAD, None)
        raise


def _layers(model: nn.Module, targets: list[Target], config: HiLoRAConfig) -> dict[str, TieredLoRALinear]:
    """The adapted layers by path, on banks shared by all projections of one shape."""
    linears = {target.module: linear_at(model, target.module) for target in targets}
    by_shape: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        by_shape.setdefault((target.columns[1], linears[target.module].in_features), []).append(target)
    projections: dict[str, list[Projection]] = {path: [] for path in linears}
    owned: dict[str, list[AdapterBank]] = {path: [] for path in linears}
    for shape, members in by_shape.items():
        like = linears[members[0].module].weight.detach()[:1, :1].expand(shape)
        bank = AdapterBank([target.path for target in members], config, like)
        owned[members[0].module].append(bank)
        for position, target in enumerate(members):
            projections[target.module].append(Projection(bank, position, target.columns))
    layers = {path: TieredLoRALinear(linear, config, projections[path]) for path, linear in linears.items()}
    for path, layer in layers.items():
        layer.banks.extend(owned[path])
    return layers


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer at a path."""
    found = model.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put another module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a ViT's classifier head, by name, but for adapted layers; none where the model has no head."""
    classifier = getattr(model, "get_classifier", None)
    if classifier is not None:  # timm
        found: Any = classifier()
        heads = found if isinstance(found, tuple) else (found,)
    else:  # transformers, torchvision, others
        heads = tuple(getattr(model, name, None) for name in HEADS)
    members = {id(parameter) for head in heads if isinstance(head, nn.Module) for parameter in head.parameters()}
    adapted = [module for module in model.modules() if isinstance(module, TieredLoRALinear)]
    members -= {id(parameter) for layer in adapted for parameter in layer.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in members}


HEADS = ("classifier", "cls_classifier", "distillation_classifier", "heads", "head")


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

    The first dimension of what the adapted layers see must be the batch: its rows are in G equal groups, one a client.
    Adapters that a tier does not have yet are added, fresh; make the optimiser after that.

    Args:
        model: a model with adapters.
        slots: for each tier named, integers `[G]`, -1 for no adapter of that tier; or None: all use the only one.

    Raises:
        ValueError: for unknown tiers, or tables of different lengths. The model is then as it was.
    """
    found = banks(model)
    tables = {tier: None if slot is None else torch.as_tensor(slot) for tier, slot in slots.items()}
    for tier, table in tables.items():
        found[0].config.rank(tier)
        if table is None:
            continue
        if table.dim() != 1 or table.dtype not in (torch.int32, torch.int64) or not len(table):
            raise ValueError(f"slots of {tier} must be integers [G], got {table.dtype} {tuple(table.shape)}")
        if int(table.min()) < -1:
            raise ValueError(f"slots of {tier} must be -1 (none) or more, got {int(table.min())}")
    for bank in found:
        lengths = {tier: len(table) for tier, table in {**bank.slots, **tables}.items() if table is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all tiers need slots for the same number of groups, got {lengths}")
    for bank in found:
        for tier, table in tables.items():
            if table is not None:
                bank.grow(tier, int(table.max()) + 1)
            bank.slots[tier] = None if table is None else table.to(bank.A[tier].device, torch.int32)
