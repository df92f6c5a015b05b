"""LoRA adapters of PEFT's into a tier of a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hilora.adapters.bank import AdapterBank
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.injection import adapted_layers, banks, head_parameters
from hilora.adapters.io.files import check_floating, open_tensors, parsed
from hilora.adapters.io.peft import CONFIG, PREFIX, WEIGHTS, Factors
from hilora.adapters.io.state import set_adapters
from hilora.adapters.layers import TieredLoRALinear
from hilora.adapters.table import AdapterTable
from hilora.errors import FileError, MissingFileError
from hilora.models.wrappers import plain_path

# What changes more than W x + scale B A x. A field that is absent, None or falsy asks for nothing.
FOREIGN = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters", "kasa_config"),
    *("trainable_token_indices", "arrow_config", "alora_invocation_tokens", "velora_config", "monteclora_config"),
)
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base weights


def import_peft(model: nn.Module, folder: str | os.PathLike[str], /, tier: str, slot: int = 0) -> nn.Module:
    """Read a LoRA adapter that PEFT saved into one adapter of a tier, with the scale that it has there.

    Layers that the folder does not adapt get a fresh adapter without effect. What is in `modules_to_save` must be the
    model's classifier head, and takes its place.

    Args:
        model: with adapters of at least the folder's rank, in the layers that it adapts.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        tier: which one.
        slot: which adapter of it.

    Returns:
        The model, changed in place; or not at all, if there is an error.

    Raises:
        FileNotFoundError: if the folder lacks a file.
        ValueError: if it is no LoRA, or of a kind that has no meaning here, is not finite, or does not fit the model.
        IndexError: for a slot that the tier does not have.
    """
    place = Path(folder)
    adapters, rest = _read(place)
    found = banks(model)
    head = _head(model, rest, place)
    layers = adapted_layers(model)
    unknown = [path for path in adapters if path not in layers]
    if unknown:
        raise FileError(
            f"{place} adapts {', '.join(unknown[:3])}{'…' if len(unknown) > 3 else ''}, which the model does not: "
            "inject it with these target_modules"
        )
    pieces = {path: _projections(path, layer, adapters.get(path), place) for path, layer in layers.items()}
    rank = max(A.shape[0] for of_layer in pieces.values() for A, _ in of_layer)
    if rank > found[0].config.rank(tier):
        raise FileError(
            f"{place} has adapters of rank {rank}, tier {tier!r} has room for {found[0].config.rank(tier)}: inject "
            "with a larger r"
        )
    of = {layer: path for path, layer in reversed(layers.items())}
    tables = [_table(bank, [pieces[of[layer]] for layer in bank.layers], tier, rank) for bank in found]
    table = AdapterTable([A for A, _ in tables], [B for _, B in tables], torch.tensor([rank]))
    set_adapters(model, tier, table, slot)
    own = head_parameters(model)
    with torch.no_grad():
        for name, value in head.items():
            own[name].copy_(value)
    return model


def config_of(folder: str | os.PathLike[str]) -> HiLoRAConfig:
    """What a model must be injected with to take a LoRA adapter that PEFT saved: its layers, and its largest rank.

    Raises:
        FileNotFoundError, ValueError: as `import_peft`.
    """
    adapters, _ = _read(Path(folder))
    rank = max(len(A) for A, _ in adapters.values())
    return HiLoRAConfig(r=rank, lora_alpha=rank, target_modules=tuple(adapters))


def _read(place: Path) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """What a folder has: adapters by the paths of their layers, scaled, and other tensors by their names."""
    described = _read_config(place / CONFIG)
    if not (place / WEIGHTS).is_file() and (place / "adapter_model.bin").exists():
        raise FileError(
            f"{place} has its weights as adapter_model.bin, a pickle, which can run code when it is read: ask whoever "
            f"made it for {WEIGHTS}, which PEFT writes by default"
        )
    tensors, _ = open_tensors(place / WEIGHTS)
    check_floating(tensors, place / WEIGHTS)
    return _taken_apart(tensors, described, place)


def _read_config(path: Path) -> dict[str, Any]:
    """A config of PEFT's that has a meaning here."""
    if not path.is_file():
        raise MissingFileError(f"there is no {CONFIG} in {path.parent}")
    described = parsed(path.read_text(encoding="utf-8", errors="replace"), path)
    if described.get("peft_type") != "LORA":
        raise FileError(f"{path} describes {described.get('peft_type')!r}: expected peft_type LORA")
    foreign = [f"{name}={described[name]!r}" for name in FOREIGN if described.get(name)]
    if described.get("bias", "none") != "none":
        foreign.append(f"bias={described['bias']!r}")
    if described.get("init_lora_weights", True) not in PLAIN_STARTS:
        foreign.append(f"init_lora_weights={described['init_lora_weights']!r}")
    if foreign:
        raise FileError(
            f"{path} has {', '.join(foreign)}: only W x + scale B A x has a meaning here. Merge it with PEFT and adapt "
            "the merged model, or train without"
        )
    return described


def _taken_apart(
    tensors: Mapping[str, Tensor], described: Mapping[str, Any], place: Path
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The adapters by the paths of their layers, scaled, and the other tensors by their names in the model."""
    halves: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = plain_path(name)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", plain)
        if not plain.startswith(PREFIX) or (match is None and "lora_" in plain):
            raise FileError(f"{place / WEIGHTS} has {name}, which has no meaning here")
        if match is None:
            rest[plain.removeprefix(PREFIX)] = value
        else:
            of_a_convolution = value.dim() == 4 and value.shape[2:] == (1, 1)
            halves.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = (
                value.flatten(1) if of_a_convolution else value
            )
    if not halves:
        raise FileError(f"{place / WEIGHTS} has no LoRA adapters")
    adapters = {}
    for path, half in halves.items():
        shapes = {factor: tuple(value.shape) for factor, value in sorted(half.items())}
        ranks = [shape[axis] for (_, shape), axis in zip(shapes.items(), (0, 1), strict=False) if len(shape) == 2]
        if len(ranks) < 2 or ranks[0] != ranks[1]:
            raise FileError(f"{place / WEIGHTS} has {shapes} for {path}: expected A [r, in] and B [out, r]")
        scale = _scale(path, ranks[0], described, place)
        wide = torch.promote_types(half["B"].dtype, torch.float32)
        adapters[path] = half["A"].to(wide), half["B"].to(wide) * scale
    return adapters, rest


def _scale(path: str, rank: int, described: Mapping[str, Any], place: Path) -> float:
    """What PEFT multiplies a layer's product `B A` by."""
    r, alpha = (_for_layer(path, described, field, pattern, place) for field, pattern in PATTERNS)
    if r != rank:
        raise FileError(f"{place / CONFIG} says rank {r:g} for {path}, its adapter has {rank}")
    return alpha / (r**0.5 if described.get("use_rslora") else r)


PATTERNS = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


def _for_layer(path: str, described: Mapping[str, Any], field: str, pattern: str, place: Path) -> float:
    """A number for a layer: the first whose pattern is an end of its path, else the config's."""
    try:
        matching = (
            value for key, value in (described.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", path)
        )
        return float(next(matching, described.get(field, 8)))
    except (re.error, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FileError(f"{place / CONFIG} has no number for {field} of {path}: {error}") from error


def _projections(path: str, layer: TieredLoRALinear, factors: Factors | None, place: Path) -> list[Factors]:
    """A layer's adapter as one for each of its projections, without the rank that has no part in it."""
    if factors is None:
        return [(torch.zeros(0, layer.in_features), torch.zeros(width, 0)) for _, width in layer.columns]
    A, B = factors
    if A.shape[1] != layer.in_features or B.shape[0] != layer.out_features:
        raise FileError(
            f"{place} has an adapter {A.shape[1]} → {B.shape[0]} for {path}, which is {layer.in_features} → "
            f"{layer.out_features}"
        )
    left_out = torch.ones(layer.out_features, dtype=torch.bool)
    found = []
    for rows in (rows if isinstance(rows, slice) else rows.cpu() for rows in layer.rows):
        left_out[rows] = False
        part = B[rows]
        used = part.any(0)
        found.append((A[used], part[:, used]))
    if B[left_out].any():
        raise FileError(
            f"{place} changes all of {path}, of which the model adapts {', '.join(layer.parts or ())} alone: inject it "
            f"with target_modules ({path.rpartition('.')[2]!r},)"
        )
    return found


def _table(bank: AdapterBank, pieces: list[list[Factors]], tier: str, rank: int) -> tuple[Tensor, Tensor]:
    """A bank's projections as A `[1, P, rank, in]` and B `[1, P, out, rank]`, the scale of the tier taken out."""
    each = [piece for of_layer in pieces for piece in of_layer]
    wide = torch.promote_types(bank.A(tier).dtype, each[0][0].dtype)
    A, B = (factor.to(wide)[:, 0] for factor in bank.fresh(tier, 1))
    A = A[:, :rank]
    B = B[..., :rank]
    for index, (given_A, given_B) in enumerate(each):
        count = len(given_A)
        A[index, :count] = given_A
        B[index, : len(given_B), :count] = given_B / bank.config.scale(tier)
    return A[None], B[None]


def _head(model: nn.Module, rest: Mapping[str, Tensor], place: Path) -> dict[str, Tensor]:
    """The tensors of modules_to_save, which must be the head."""
    own = head_parameters(model)
    for name, value in rest.items():
        if name not in own:
            raise FileError(
                f"{place} saves {name}, which is not of the model's head ({', '.join(own) or 'it has none'}): name it "
                "by HiLoRAConfig(modules_to_save=...)"
            )
        if value.shape != own[name].shape:
            raise FileError(f"{place} has {name} {tuple(value.shape)}, the model {tuple(own[name].shape)}")
    return dict(rest)
