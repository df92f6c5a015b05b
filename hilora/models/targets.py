"""Which linear layers, and which slices of fused ones, the names in `target_modules` mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hilora.errors import InvalidValueError
from hilora.models.registry import aliases, family_of

ALL_LINEAR = "all-linear"


class Target(NamedTuple):
    """A linear layer, or some columns of its output, to adapt."""

    path: str  # of the projection: a slice of `attn.qkv` is called `attn.q`
    module: str
    columns: tuple[int, int]  # (start, width)


def find_targets(model: nn.Module, names: Iterable[str] | str) -> list[Target]:
    """The projections of a model that `names` mean, in the order of the model.

    Args:
        model: any module.
        names: names and patterns as `HiLoRAConfig.target_modules` explains them; or a string: "all-linear" for all
            linear layers but the classifier's, else a regular expression that the whole of a path must match.

    Raises:
        ValueError: if a name finds nothing, if projections overlap (`qkv` beside `q`), or if a fused layer does not
            hold q, k and v one after the other.
    """
    candidates = [
        target
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for target in _projections(path, module)
    ]
    meant = set()
    for name in [names] if isinstance(names, str) else names:
        if name == ALL_LINEAR and isinstance(names, str):
            matched = _all_linear(model, candidates)
        elif isinstance(names, str):
            matched = _whole_first([target for target in candidates if re.fullmatch(name, target.path)])
        else:
            matched = _meant(candidates, name)
        if not matched:
            linears = sorted({target.path.rpartition(".")[2] for target in candidates})
            raise InvalidValueError(
                f"target {name!r} finds no linear layer; the last names of those there are: {linears}"
            )
        meant.update(matched)
    found = [target for target in candidates if target in meant]
    whole = {target.module for target in found if target.path == target.module}
    for target in found:
        if target.path != target.module:
            fused = target.module.rpartition(".")[2]
            if _interleaves(model.get_submodule(target.module.rpartition(".")[0]), target):
                raise InvalidValueError(
                    f"{target.module} does not hold {', '.join(fused)} one after the other in equal parts: adapt it "
                    f"whole, as {fused!r}"
                )
            if target.module in whole:
                raise InvalidValueError(
                    f"{target.module} and its slice {target.path} are both targets: choose one of them"
                )
    return found


def _projections(path: str, module: nn.Linear) -> list[Target]:
    """A layer, and if it is a fused one also its slices: those of `attn.qkv` are `attn.q`, `attn.k` and `attn.v`."""
    whole = [Target(path, path, (0, module.out_features))]
    parent, dot, name = path.rpartition(".")
    if name not in ("qkv", "kv", "qk") or module.out_features % len(name):
        return whole
    width = module.out_features // len(name)
    return whole + [Target(f"{parent}{dot}{part}", path, (i * width, width)) for i, part in enumerate(name)]


def _interleaves(attention: nn.Module, target: Target) -> bool:
    """Whether a fused layer mixes its parts head by head, or has parts of several widths: so in timm's MaxViT, and
    where keys have a width of their own (TinyViT, EfficientFormer)."""
    values_in = getattr(getattr(attention, "proj", None), "in_features", target.columns[1])
    return (
        getattr(attention, "head_first", False)
        or hasattr(attention, "key_dim")
        or ("v" in target.module.rpartition(".")[2] and values_in != target.columns[1])
    )


def _meant(candidates: list[Target], name: str) -> list[Target]:
    """The projections that a name matches."""
    ends = aliases().get(name, [name])
    patterns = [pattern for end in ends for pattern in (end, f"*.{end}")]
    return _whole_first(
        [target for target in candidates if any(fnmatchcase(target.path, pattern) for pattern in patterns)]
    )


def _whole_first(matched: list[Target]) -> list[Target]:
    """A fused layer as a whole, where a pattern matches that and its slices."""
    whole = {target.module for target in matched if target.path == target.module}
    return [target for target in matched if target.path == target.module or target.module not in whole]


def _all_linear(model: nn.Module, candidates: list[Target]) -> list[Target]:
    """All linear layers but those of the classifier, and those that nn.MultiheadAttention has but never calls."""
    heads = {id(module) for head in family_of(model).heads(model) for module in head.modules()}
    left_out = {
        path
        for path, module in model.named_modules()
        if id(module) in heads or isinstance(module, NonDynamicallyQuantizableLinear)
    }
    return [target for target in candidates if target.path == target.module and target.module not in left_out]
