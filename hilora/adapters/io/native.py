"""Adapters in safetensors files: all tiers, the config, and the classifier head if it was trained."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hilora.adapters.bank import AdapterBank
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.factors import is_quantised, sharded_as, whole
from hilora.adapters.injection import FRESH_HEAD, banks, has_adapters, head_parameters, inject, restored_on_error
from hilora.adapters.io.base import check_base as same_base
from hilora.adapters.io.base import describe_base
from hilora.adapters.io.files import check_floating, read_tensors, write_tensors
from hilora.adapters.offload import brought
from hilora.errors import FileError, HiLoRAError, InvalidTypeError
from hilora.models.wrappers import unwrapped


def save_adapters(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of all tiers, their config, what base they belong to, and the head if it was trained, whole or
    not at all. The same adapters give the same bytes.

    Args:
        model: a model with adapters, merged or not.
        path: of a file; folders are made.

    Raises:
        ValueError: if the model has no adapters, an adapter is not finite, or there cannot be a file at the path.
    """
    tensors: dict[str, Tensor] = {}
    found = banks(model, merged=True)
    for index, bank in enumerate(found):
        for tier in bank.tiers:
            tensors[f"{index}.{tier}.lora_A"] = bank.A(tier)
            tensors[f"{index}.{tier}.lora_B"] = bank.scaled_B(tier)
    tensors |= {f"head.{name}": value for name, value in trained_head(model).items()}
    configs = [_counted(bank).to_dict() for bank in found]
    described: dict[str, Any] = {"config": configs[0], "projections": [bank.names for bank in found]}
    if any(config != configs[0] for config in configs):  # single layers, each with its own
        described["configs"] = configs
    ranks = [
        {tier: bank.rank_of(tier).tolist() for tier in bank.tiers if bank.ranks[tier] is not None} for bank in found
    ]
    if any(ranks):
        described["ranks"] = ranks
    described["base"] = describe_base(model)
    write_tensors(path, tensors, described)


def trained_head(model: nn.Module) -> dict[str, Tensor]:
    """`head_parameters`, if they are not what they were at injection; else nothing."""
    model = unwrapped(model)
    fresh = model.__dict__.get(FRESH_HEAD, {})
    head = {name: whole(brought(model, value).detach()) for name, value in head_parameters(model).items()}
    same = all(name in fresh and torch.equal(value.cpu(), whole(fresh[name]).cpu()) for name, value in head.items())
    return {} if same else head


def _counted(bank: AdapterBank) -> HiLoRAConfig:
    """A bank's config, with the adapters that there are now for those that it started with."""
    slots = {tier: bank.slot_count(tier) for tier in bank.tiers}
    same = all(bank.config.slot_count(tier) == count for tier, count in slots.items())
    return bank.config if same else replace(bank.config, slots=slots)


def load_adapters(model: nn.Module, path: str | os.PathLike[str], check_base: bool = True) -> nn.Module:
    """Read adapters into a model that has the same ones, or into a plain model, which is injected as the file says.

    Args:
        model: a model with adapters, or without.
        path: a file of `save_adapters`.
        check_base: whether the model's frozen weights must be those that the adapters were trained on.

    Returns:
        The model, changed in place; or not at all, if there is an error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a corrupt or foreign file, one that is not finite, or one that does not fit the model.
    """
    tensors, described = read_tensors(path)
    check_floating(tensors, path)
    with _naming(path):
        configs, projections, ranks = _adapters_described(tensors, described, path)
        base = described.get("base")
        plain = not has_adapters(model)
        with restored_on_error(unwrapped(model)) if plain else nullcontext():
            if plain:
                if ("",) in projections:
                    raise FileError(f"{path} is of single layers: wrap these in hilora.TieredLoRALinear, then load it")
                inject(model, replace(configs[0], slots=0))  # no memory until it is known that the file fits
            tables = _tables(banks(model), configs, projections, tensors, ranks, path)
            own_head = head_parameters(model)
            head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
            shapes, own_shapes = ({name: tuple(p.shape) for name, p in some.items()} for some in (head, own_head))
            if head and shapes != own_shapes:
                raise FileError(f"{path} has a head {shapes}, the model {own_shapes}")
            if any(is_quantised(own_head[name]) for name in head):
                raise FileError(f"{path} has a head, and that of the model is quantised: load the file, then quantise")
            if any(brought(model, own_head[name]) is not own_head[name] for name in head):
                raise FileError(f"{path} has a head, and accelerate offloaded that of the model: load the file before")
            if check_base and isinstance(base, dict) and base:
                same_base(model, base, path)
    for bank, tier, A, B, rank in tables:
        bank.assign(tier, A, B, rank)
        if plain:
            bank.shared.config = configs[0]
    with torch.no_grad():
        for name, value in head.items():
            own_head[name].copy_(sharded_as(own_head[name], value))
    return model


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let every error about the content of a file name it."""
    try:
        yield
    except HiLoRAError as error:
        if str(path) in str(error) or isinstance(error, InvalidTypeError):
            raise
        raise FileError(f"{path} does not fit: {error}") from error


def _adapters_described(
    tensors: dict[str, Tensor], described: dict[str, Any], path: Any
) -> tuple[list[HiLoRAConfig], list[tuple[str, ...]], list[dict[str, Tensor]]]:
    """What a file says of its banks: config, names of projections, ranks; no larger than its tensors are."""
    try:
        projections = [tuple(str(name) for name in names) for names in described["projections"]]
        each = described.get("configs", [described["config"]] * len(projections))
        configs = [HiLoRAConfig.from_dict(config) for config in each]
        ranks = [
            {str(tier): torch.tensor(rank, dtype=torch.long) for tier, rank in of_bank.items()}
            for of_bank in described.get("ranks", [{}] * len(projections))
        ]
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise FileError(f"{path} does not describe adapters: {error!r}") from error
    if not 0 < len(projections) == len(configs) == len(ranks):
        raise FileError(f"{path} does not describe adapters: {len(configs)} configs for {len(projections)} banks")
    for index, config in enumerate(configs):
        for tier in config.tiers:
            A, B = tensors.get(f"{index}.{tier}.lora_A"), tensors.get(f"{index}.{tier}.lora_B")
            if A is None or B is None:
                raise FileError(f"{path} lacks the adapters of tier {tier!r}")
            if A.dim() != 4 or A.shape[2] != config.rank(tier) or A.shape[1] < config.slot_count(tier):
                raise FileError(
                    f"{path} has adapters that do not fit tier {tier!r}: A {tuple(A.shape)}, expected [P, S, r, in] "
                    f"of rank {config.rank(tier)} with at least {config.slot_count(tier)} slots"
                )
    return configs, projections, ranks


def _tables(
    found: list[AdapterBank],
    configs: list[HiLoRAConfig],
    names: list[tuple[str, ...]],
    tensors: dict[str, Tensor],
    ranks: list[dict[str, Tensor]],
    path: Any,
) -> list[tuple[AdapterBank, str, Tensor, Tensor, Tensor | None]]:
    """What to put into which bank and tier, once all of it is seen to fit."""
    own = [bank.names for bank in found]
    if own != names:
        raise FileError(f"{path} adapts other projections than the model: {_some(names)}, not {_some(own)}")
    for config, bank in zip(configs, found, strict=True):
        if _shape(config) != _shape(bank.config):
            raise FileError(f"{path} has tiers (rank, scale) {_shape(config)}, the model {_shape(bank.config)}")
    tables = []
    for index, bank in enumerate(found):
        for tier in bank.tiers:
            A, B = tensors[f"{index}.{tier}.lora_A"], tensors[f"{index}.{tier}.lora_B"]
            bank.check(tier, A, B)
            rank = ranks[index].get(tier)
            if rank is not None and (rank.shape != A.shape[1:2] or int(rank.max()) > bank.config.rank(tier)):
                raise FileError(f"{path} has ranks {rank.tolist()} for {A.shape[1]} adapters of tier {tier!r}")
            slot = bank.slots[tier]
            if slot is not None and int(slot.max()) >= A.shape[1]:
                raise FileError(
                    f"the model's slots use adapter {int(slot.max())} of tier {tier!r}, {path} has {A.shape[1]}: "
                    f"choose others by hilora.set_slots, or none, set_slots(model, {tier}=None)"
                )
            tables.append((bank, tier, A, B, rank))
    return tables


def _shape(config: HiLoRAConfig) -> dict[str, tuple[int, float]]:
    return {tier: (config.rank(tier), config.scale(tier)) for tier in config.tiers}


def _some(names: Any) -> str:
    flat = [name for group in names for name in group]
    return ", ".join(flat[:2]) + f"… ({len(flat)})"
