"""Adapters to and from the folders of PEFT: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hilora.adapters.bank import AdapterBank
from hilora.adapters.injection import adapted_layers, banks
from hilora.adapters.io.files import serialised, write_files
from hilora.adapters.io.native import trained_head
from hilora.adapters.layers import TieredLoRALinear
from hilora.errors import InvalidValueError
from hilora.models.attention import OpenAttention
from hilora.models.heads import find_heads
from hilora.models.wrappers import plain_path, unwrapped

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Factors = tuple[Tensor, Tensor]  # A [r, in], B [out, r], the scale inside of B


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    /,
    rank: int | None = None,
    stacked: bool = True,
    **slots: int,
) -> float:
    """Write one client's path through the tiers as a folder that `peft.PeftModel.from_pretrained` loads on the plain
    model, with the same outputs.

    The tiers become one adapter, whose rank is the sum of theirs; q and v of a fused layer are blocks of that layer's
    B. A classifier that was trained is in `modules_to_save`. The folder's files are written whole or not at all.

    Args:
        model: a model with adapters, merged or not.
        folder: to be made, or to write into.
        rank: cut each layer's adapter down to the best one of this rank; None keeps all, exactly.
        stacked: False writes an adapter for each tier instead, in `folder/root`, `folder/cluster`, …, to be loaded
            under these names and used together; the classifier is with the last of them.
        slots: which adapter of each tier, -1 for none; the only one where a tier is not named.

    Returns:
        What `rank` took away: the Frobenius norm of the change of the weights' updates, relative to that of the
        updates; 0.0 where nothing was.

    Raises:
        ValueError: if the model has no adapters, a slot has to be named, there is nothing to export, or PEFT has no
            words for it.
        IndexError: for a slot that a tier does not have.
    """
    layers = _layers(model)
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        raise InvalidValueError(f"rank must be a whole number of at least 1, or None, got {rank!r}")
    tiers = next(iter(layers.values()))[0].config.tiers
    used = [tier for tier in tiers if slots.get(tier, 0) != -1]
    if not used or set(slots) - set(tiers):
        raise InvalidValueError(f"there is nothing to export of {slots}: the tiers are {', '.join(tiers)}")
    contents: dict[str | os.PathLike[str], bytes] = {}
    lost = whole = 0.0
    for place, members in {Path(folder): used}.items() if stacked else {Path(folder, t): [t] for t in used}.items():
        adapters: dict[str, Factors] = {}
        for path, (layer, bank) in layers.items():
            A, B = _stacked(layer, bank, {tier: slots.get(tier) for tier in members})
            if rank is not None and len(A) > rank:
                A, B, squares = _cut(A, B, rank)
                lost += squares
            whole += float(((B.mT @ B).double() * (A @ A.mT).double()).sum())
            adapters[path] = A, B
        described, tensors = _as_peft_has_them(model, adapters, head=used[-1] in members)
        contents[place / CONFIG] = json.dumps(described, indent=2, sort_keys=True).encode() + b"\n"
        contents[place / WEIGHTS] = serialised(tensors, {"format": "pt"})
    write_files(contents)
    return (lost / (lost + whole)) ** 0.5 if lost else 0.0


def _layers(model: nn.Module) -> dict[str, tuple[TieredLoRALinear, AdapterBank]]:
    """The adapted layers by path, each with the bank that it is of."""
    of = {layer: bank for bank in banks(model, merged=True) for layer in bank.layers}
    layers = {path: (layer, of[layer]) for path, layer in adapted_layers(model, merged=True).items()}
    places = Counter(layer for layer, _ in layers.values())
    opened = {module.in_proj for module in model.modules() if isinstance(module, OpenAttention)}
    for path, (layer, bank) in layers.items():
        if places[layer] > 1:
            raise InvalidValueError(f"{path} is used at {places[layer]} places of the model, which PEFT cannot say")
        if layer.parts is None:
            raise InvalidValueError(f"{path or 'the model'} was wrapped by itself: use hilora.inject to export it")
        if layer in opened:
            raise InvalidValueError(f"{path} is of an nn.MultiheadAttention, which PEFT adapts in a way of its own")
        if bank.composition is not None:
            raise InvalidValueError("a composition weighs the tiers against each other, which PEFT cannot say")
    return layers


def _stacked(layer: TieredLoRALinear, bank: AdapterBank, slots: Mapping[str, int | None]) -> Factors:
    """The adapters of some tiers as one for the whole of a layer: its rank is the sum over tiers and projections."""
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    wide = torch.promote_types(layer.frozen_weight.dtype, torch.float32)
    for tier, given in slots.items():
        slot = layer.slot(tier, given)
        if slot == -1:  # of a tier without adapters
            continue
        rank = int(bank.rank_of(tier)[slot])
        for rows, (A, B) in zip(layer.rows, layer.factors(tier, slot), strict=True):
            columns = torch.zeros(layer.out_features, rank, dtype=wide, device=B.device)
            columns[rows] = layer.config.scale(tier) * B[:, :rank].detach()
            As.append(A[:rank].detach().to(wide))
            Bs.append(columns)
    if not As:
        raise InvalidValueError(f"there is nothing to export: {', '.join(slots)} has no adapters")
    return torch.cat(As), torch.cat(Bs, 1)


def _cut(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best adapter of a smaller rank, and the squared Frobenius norm of what is lost."""
    left, of_B = torch.linalg.qr(B.double())
    right, of_A = torch.linalg.qr(A.double().mT)
    U, S, V = torch.linalg.svd(of_B @ of_A.mT)
    root = S[:rank].sqrt()
    new_A, new_B = root[:, None] * (V[:rank] @ right.mT), left @ U[:, :rank] * root
    return new_A.to(A), new_B.to(B), float(S[rank:].square().sum())


def _as_peft_has_them(
    model: nn.Module, adapters: Mapping[str, Factors], head: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter of PEFT's."""
    tensors, layers = {}, adapted_layers(model, merged=True)
    for path, factors in adapters.items():
        kernel = layers[path].frozen_weight.shape[2:]  # of a convolution
        A, B = (factor.reshape(*factor.shape, *kernel) for factor in factors)
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = A, B
    saved: list[str] = []
    if head and (trained := trained_head(model)):
        saved = _whole_modules(model, set(trained))
        tensors |= {f"{PREFIX}{name}": value for name, value in _state(model, saved).items()}
    ranks = {path: len(A) for path, (A, _) in adapters.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # The scale is in B: so alpha / r is 1.
    others = {_pattern(path, ranks): rank for path, rank in ranks.items() if rank != usual}
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(unwrapped(model), "name_or_path", None) or None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": [_anchored(model, path) for path in saved] or None,
        "target_modules": _targets(model, list(adapters)),
    }
    return described, tensors


def _pattern(path: str, among: Iterable[str]) -> str:
    """What PEFT finds the rank of this layer by: its path, which old versions look for as it stands; where others end
    like it, an expression of the whole of it."""
    alike = [other for other in among if re.match(rf"(.*\.)?({path})$", other)]
    return path if alike == [path] else f"^{re.escape(path)}"


def _targets(model: nn.Module, paths: list[str]) -> list[str] | str:
    """What PEFT finds these layers and no others by: their last names, or else an expression of their paths."""
    model, ends = unwrapped(model), {path.rpartition(".")[2] for path in paths}
    found = {plain_path(path, model) for path, _ in model.named_modules()}
    alike = {path for path in found if path.rpartition(".")[2] in ends}
    return sorted(ends) if alike == set(paths) else "|".join(re.escape(path) for path in paths)


def _anchored(model: nn.Module, path: str) -> str:
    """A path as PEFT finds this module by and no other: it looks for the end of a name, which may be within a word."""
    model = unwrapped(model)
    others = {plain_path(name, model) for name, _ in model.named_modules()} - {path}
    return PREFIX + path if any(name.endswith(path) for name in others) else path


def _whole_modules(model: nn.Module, names: set[str]) -> list[str]:
    """Paths of the largest modules of the head that hold no adapted layer, which hold these parameters."""
    model = unwrapped(model)
    layers = next(iter(adapted_layers(model, merged=True).values()))
    heads = find_heads(model, layers.config.modules_to_save)
    adapted = set(adapted_layers(model, merged=True))
    found: list[str] = []
    for path, module in model.named_modules():
        plain = plain_path(path, model)
        within = any(_inside(plain, other) for other in found)
        if within or not any(module is part for head in heads for part in head.modules()):
            continue
        if any(_inside(layer, plain) for layer in adapted):
            continue
        if next(module.parameters(), None) is not None:
            found.append(plain)
    lost = [name for name in names if not any(_inside(name, path) for path in found)]
    if lost:
        raise InvalidValueError(
            f"PEFT saves modules, not single parameters: {', '.join(sorted(lost)[:3])} of the head cannot be exported; "
            "leave the adapted layers out of the head, or name what to train by modules_to_save"
        )
    return found


def _inside(path: str, of: str) -> bool:
    return path == of or path.startswith(f"{of}.")


def _state(model: nn.Module, modules: list[str]) -> dict[str, Tensor]:
    """All tensors of some modules, by their names in the model."""
    model = unwrapped(model)
    state = {plain_path(name, model): value for name, value in model.state_dict().items()}
    return {name: value for name, value in state.items() if any(_inside(name, path) for path in modules)}
