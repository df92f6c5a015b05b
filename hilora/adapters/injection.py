"""Put adapters into a model, and choose the tier in training and each client's adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hilora.adapters.bank import AdapterBank
from hilora.adapters.callcheck import UncalledLayerError, check_calls, end_check, watch_rows
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.convolution import TieredLoRAConv2d
from hilora.adapters.layers import TieredLoRALinear
from hilora.adapters.loading import adapters_may_stay
from hilora.adapters.offload import brought
from hilora.adapters.reduction import check_reduction, watch_reduction
from hilora.adapters.shared import Shared
from hilora.adapters.statistics import freeze_statistics, thaw_statistics
from hilora.adapters.torch_internals import remove_hook, walk
from hilora.errors import InvalidValueError
from hilora.models.attention import close_attentions, is_packed, open_attention
from hilora.models.heads import example_image, find_heads, says_its_head
from hilora.models.pointwise import widths
from hilora.models.targets import Target, find_targets, order
from hilora.models.wrappers import plain_path, unwrapped

FRESH_HEAD = "_hilora_fresh_head"  # attributes of a model: its head before training,
MERGED = "_hilora_merged"  # and the layers that a merge has put aside


def banks(model: nn.Module, merged: bool = False) -> list[AdapterBank]:
    """The adapters in a model: one bank for each shape of projection.

    Args:
        model: a model with adapters.
        merged: also those that a merge has put aside.

    Raises:
        ValueError: if the model has none, or they are merged.
    """
    paths: dict[TieredLoRALinear, str] = {}
    for path, layer in adapted_layers(model, merged).items():
        paths.setdefault(layer, path)
    if not paths:
        raise InvalidValueError(
            f"{type(unwrapped(model)).__name__} has no adapters: inject them first, by hilora.inject(model, config)"
        )
    members: dict[Shared, list[TieredLoRALinear]] = {}
    for layer in paths:
        members.setdefault(layer.shared, []).append(layer)
    return [
        AdapterBank(layers, [name for layer in layers for name in _names(paths[layer], layer)])
        for layers in members.values()
    ]


def adapted_layers(model: nn.Module, merged: bool = False) -> dict[str, TieredLoRALinear]:
    """The adapted layers by their paths in the user's model, without what wrappers add to these.

    Args:
        model: any module.
        merged: also those that a merge has put aside.

    Raises:
        ValueError: if they are merged, and `merged` is not said.
    """
    model = unwrapped(model)
    aside: dict[str, TieredLoRALinear] | None = model.__dict__.get(MERGED)
    if aside is not None and not merged:
        raise InvalidValueError(
            "the adapters are merged into the weights: take them out first, by hilora.unmerge(model)"
        )
    found = walk(model, TieredLoRALinear) if aside is None else aside.items()
    return {plain_path(path, model): layer for path, layer in found}


def _names(path: str, layer: TieredLoRALinear) -> list[str]:
    """Paths of a layer's projections: slices of `attn.qkv` are called `attn.q` and `attn.v`. A layer that a user
    wrapped by hand has no name."""
    parent, dot, _ = path.rpartition(".")
    return [""] if layer.parts is None else [parent + dot + part for part in layer.parts]


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters were injected, be they merged or not."""
    return MERGED in unwrapped(model).__dict__ or any(
        isinstance(module, TieredLoRALinear) for module in model.modules()
    )


@torch.inference_mode(False)
def inject(model: nn.Module, config: HiLoRAConfig, example_input: Tensor | None = None) -> nn.Module:
    """Put adapters into a model, in place; its outputs do not change yet.

    Everything but the first tier, and a ViT's classifier head, is frozen. The parameters are at the layers that they
    adapt, `blocks.3.attn.qkv.lora_A.leaf`. Fresh adapters are drawn from torch's global random stream of the CPU, also
    for a model on another device.

    Args:
        model: a ViT of timm, transformers or torchvision, or any module that contains what the targets name.
        config: the adapters.
        example_input: an input to check with that the model calls each adapted layer. ViTs need none. Other models
            are checked in their first forward pass.

    Returns:
        The model.

    Raises:
        ValueError: if a target finds nothing, the model has adapters already, or (`UncalledLayerError`) it neither
            calls an adapted layer nor reads its weight.
        TypeError: if a target computes something else than an `nn.Linear` or `nn.Conv2d`.
            After any error the model is as it was.
    """
    given, model = model, unwrapped(model)
    if has_adapters(model):
        raise InvalidValueError("the model has adapters already: take them out first, by hilora.unload(model)")
    if isinstance(model, nn.Linear):
        raise InvalidValueError(
            "a single nn.Linear cannot be changed in place: wrap it, hilora.TieredLoRALinear(linear, ...)"
        )
    if isinstance(given, nn.parallel.DistributedDataParallel):
        raise InvalidValueError(
            "DistributedDataParallel would not synchronise the adapters' gradients: inject them first, then wrap"
        )
    targets: list[Target] = find_targets(
        model, config.target_modules, config.layers_to_transform, config.modules_to_save
    )
    heads = find_heads(model, config.modules_to_save)
    if not heads and config.modules_to_save is None and not says_its_head(model):
        warnings.warn(
            f"no classifier head was found in {type(model).__name__}: nothing but adapters will be trained and saved. "
            "Name it by HiLoRAConfig(modules_to_save=('fc',)), or say that there is none, modules_to_save=()",
            stacklevel=2,
        )
    example = example_image(model) if example_input is None else example_input
    try:
        _inject(model, config, targets, example, example_input is not None)
    except UncalledLayerError as error:
        rest = [target for target in targets if target.module not in error.paths]
        if not rest or not _can_do_without(config, targets, rest):
            raise
        warnings.warn(f"the model never calls {', '.join(error.paths)}: left without adapters", stacklevel=2)
        _inject(model, config, rest, example, example_input is not None)
    return given


def _inject(model: nn.Module, config: HiLoRAConfig, targets: list[Target], example: Tensor | None, given: bool) -> None:
    """Put adapters at the targets."""
    with restored_on_error(model):
        for path in {target.module.rpartition(".")[0] for target in targets}:
            if is_packed(model.get_submodule(path)):
                open_attention(model.get_submodule(path))
        layers = _layers(model, targets, config)
        by_original = {model.get_submodule(path): layer for path, layer in layers.items()}
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if module in by_original:
                replace(model, path, by_original[module])
        freeze_statistics(model)
        model.register_load_state_dict_post_hook(adapters_may_stay)
        check_calls(model, layers, example, given)
        head = head_parameters(model).items()
        model.__dict__[FRESH_HEAD] = {name: brought(model, p).detach().clone() for name, p in head}
        set_active_tier(model, config.tiers[0])
        if config.base_dtype is not None:
            for layer in layers.values():
                layer.narrow()


def _can_do_without(config: HiLoRAConfig, targets: list[Target], rest: list[Target]) -> bool:
    """Whether the rest of the targets has some of each kind, and no layer is left out that was asked for by itself."""
    names = {(target.path, target.module) for target in set(targets) - set(rest)}
    kinds = [{re.sub(r"\d+", "*", target.path).rpartition(".")[2] for target in some} for some in (targets, rest)]
    return kinds[0] == kinds[1] and not any(set(pair) & set(config.target_modules) for pair in names)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put a model without adapters back as it was, if the block raises an error."""
    plain = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if widths(module)]
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        end_check(model)
        remove_hook(model, check_reduction)
        remove_hook(model, adapters_may_stay)
        thaw_statistics(model)
        for path, module in plain:
            replace(model, path, module)
        close_attentions(model)
        for parameter, flag in required_grad:
            parameter.requires_grad_(flag)
        model.__dict__.pop(FRESH_HEAD, None)
        raise


def _layers(model: nn.Module, targets: list[Target], config: HiLoRAConfig) -> dict[str, TieredLoRALinear]:
    """The adapted layers by path, with adapters that have no effect yet."""
    by_layer: dict[str, list[Target]] = {}
    for target in targets:
        by_layer.setdefault(target.module, []).append(target)
    layers: dict[str, TieredLoRALinear] = {}
    by_shape: dict[tuple[int, int], dict[str, TieredLoRALinear]] = {}
    for path, members in by_layer.items():
        base = model.get_submodule(path)
        kind = TieredLoRAConv2d if isinstance(base, nn.Conv2d) else TieredLoRALinear
        shape = (max(target.columns[1] for target in members), (widths(base) or (0, 0))[0])
        alike = by_shape.setdefault(shape, {})
        shared = next(iter(alike.values())).shared if alike else Shared(config)
        parts = {target.path.rpartition(".")[2]: target.columns for target in members}
        alike[path] = layers[path] = kind(base, config, parts, shared, order(model, members))
    for alike in by_shape.values():
        names = [name for path, layer in alike.items() for name in _names(path, layer)]
        AdapterBank(list(alike.values()), names).start()
    return layers


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put another module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the modules that are trained whole, a ViT's classifier head, by name, but for adapted layers; none
    where the model has no head."""
    model = unwrapped(model)
    adapted = adapted_layers(model, merged=True).values()
    config = next((layer.config for layer in adapted), None)
    heads = find_heads(model, config.modules_to_save if config is not None else None)
    members = {id(parameter) for head in heads for parameter in head.parameters()}
    members -= {id(parameter) for layer in adapted for parameter in layer.parameters()}
    found = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in members]
    return {plain_path(name, model): parameter for name, parameter in found}


def set_active_tier(model: nn.Module, tier: str) -> None:
    """Train this tier, and a ViT's classifier head if it has one, and nothing else.

    Under DistributedDataParallel, wrap the model anew after each change of tier: a wrapper synchronises the gradients
    of what required some when it was made. Otherwise the next forward pass through the old one is an error.

    Raises:
        ValueError: for a tier that the adapters do not have, or a model in DistributedDataParallel.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise InvalidValueError(
            "DistributedDataParallel would not synchronise the gradients of another tier than the one it was made for: "
            f"hilora.set_active_tier(model.module, {tier!r}), then wrap that anew"
        )
    found = banks(model)
    for bank in found:
        bank.config.rank(tier)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for bank in found:
        bank.activate(tier)
    for parameter in head_parameters(model).values():
        parameter.requires_grad_(True)
    watch_reduction(unwrapped(model))


@torch.inference_mode(False)
def set_slots(model: nn.Module, /, **slots: Tensor | None) -> None:
    """Say which adapter of each tier a client uses, where a batch holds several clients.

    The first dimension of what the adapted layers see must be the batch: its rows are in G equal groups, one a client.
    Adapters that a tier does not have yet are added, fresh; make the optimiser after that.

    Args:
        model: a model with adapters.
        slots: for each tier named, integers `[G]`, -1 for no adapter of that tier; or None: all use the only one.

    Raises:
        ValueError: for unknown tiers, or tables of different lengths. The model is then as it was.
    """
    found, model = banks(model), unwrapped(model)
    tables = {tier: None if slot is None else torch.as_tensor(slot) for tier, slot in slots.items()}
    for tier, table in tables.items():
        found[0].config.rank(tier)
        if table is not None and not (table.dim() == 1 and table.dtype in (torch.int32, torch.int64) and len(table)):
            raise InvalidValueError(f"slots of {tier} must be integers [G], got {table.dtype} {tuple(table.shape)}")
        if table is not None and int(table.min()) < -1:
            raise InvalidValueError(f"slots of {tier} must be -1 (none) or more, got {int(table.min())}")
    for bank in found:
        lengths = {tier: len(table) for tier, table in {**bank.slots, **tables}.items() if table is not None}
        if len(set(lengths.values())) > 1:
            raise InvalidValueError(f"all tiers need slots for the same number of groups, got {lengths}")
    if any(table is not None and len(table) > 1 for table in tables.values()):
        watch_rows(model)
    for bank in found:
        for tier, table in tables.items():
            if table is not None:
                bank.grow(tier, int(table.max()) + 1)
            bank.slots[tier] = None if table is None else table.to(bank.device, torch.int32, copy=True)
