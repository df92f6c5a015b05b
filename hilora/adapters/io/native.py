"""Adapters in safetensors files: all tiers, the config, and the classifier head if it was trained."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hilora.adapters.bank import AdapterBank
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.injection import FRESH_HEAD, banks, has_adapters, head_parameters, inject, restored_on_error
from hilora.adapters.io.base import check_base as same_base
from hilora.adapters.io.base import describe_base
from hilora.errors import FileError, MissingFileError

FORMAT = "hilora-1"


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
            tensors[f"{index}.{tier}.lora_B"] = bank.B(tier)
    fresh = model.__dict__.get(FRESH_HEAD, {})
    head = head_parameters(model)
    if any(name not in fresh or not torch.equal(value.cpu(), fresh[name].cpu()) for name, value in head.items()):
        tensors |= {f"head.{name}": value for name, value in head.items()}
    configs = [bank.config.to_dict() for bank in found]
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
    try:
        projections = [tuple(str(name) for name in names) for names in described["projections"]]
        each = described.get("configs", [described["config"]] * len(projections))
        configs = [HiLoRAConfig.from_dict(config) for config in each]
        ranks = [
            {str(tier): torch.tensor(rank, dtype=torch.long) for tier, rank in of_bank.items()}
            for of_bank in described.get("ranks", [{}] * len(projections))
        ]
        base = dict(described.get("base") or {})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FileError(f"{path} does not describe adapters: {error!r}") from error
    if not 0 < len(projections) == len(configs) == len(ranks):
        raise FileError(f"{path} does not describe adapters: {len(configs)} configs for {len(projections)} banks")
    head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    own_head = head_parameters(model)
    shapes, own_shapes = ({name: tuple(p.shape) for name, p in some.items()} for some in (head, own_head))
    if head and shapes != own_shapes:
        raise FileError(f"{path} has a head {shapes}, the model {own_shapes}")
    plain = not has_adapters(model)
    with restored_on_error(model) if plain else nullcontext():
        if plain:
            if ("",) in projections:
                raise FileError(f"{path} is of single layers: wrap these in hilora.TieredLoRALinear, then load it")
            inject(model, configs[0])
        tables = _tables(banks(model), configs, projections, tensors, ranks, path)
        if check_base and base:
            same_base(model, base, path)
    for bank, tier, A, B, rank in tables:
        bank.assign(tier, A, B, rank)
    with torch.no_grad():
        for name, value in head.items():
            own_head[name].copy_(value)
    return model


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
            A, B = tensors.get(f"{index}.{tier}.lora_A"), tensors.get(f"{index}.{tier}.lora_B")
            if A is None or B is None:
                raise FileError(f"{path} lacks the adapters of tier {tier!r}")
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


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Write tensors and a description (JSON values) to a safetensors file, whole or not at all.

    Raises:
        ValueError: if a tensor is not finite, or there cannot be a file at the path.
    """
    _check_finite(tensors, f"nothing is saved to {path}")
    target = Path(path)
    if target.is_dir() or os.fspath(path).endswith(os.sep):
        raise FileError(f"{path} is a folder: give the path of a file, such as {target / 'adapters.safetensors'}")
    missing = [folder for folder in target.parents if not folder.exists()]
    if not (missing[-1].parent if missing else target.parent).is_dir():
        raise FileError(f"{path} cannot be a file: what it would be in is no folder")
    partial = Path(f"{path}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_serialised(tensors, {"format": FORMAT, "hilora": json.dumps(described)}))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        for folder in missing:
            folder.rmdir() if folder.is_dir() else None
        raise


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, its metadata in this order; the library would write it in a random one."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    file = save(plain, metadata)
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps({**json.loads(file[8:start]), "__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[start:]


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a corrupt or foreign file, or one that is not finite.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"there is no file of adapters at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FileError(
                    f"{path} is no file of hilora's: its format is {metadata.get('format')!r}, not {FORMAT!r}"
                )
            described = json.loads(metadata["hilora"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    _check_finite(tensors, f"{path} is not read")
    return tensors, described


def _check_finite(tensors: dict[str, Tensor], consequence: str) -> None:
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise FileError(f"{name} is not finite: {consequence}")
