"""Which linear layers, and which slices of fused ones, the names in `target_modules` mean."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

# What libraries call the layers of a block; a target finds a path that ends in any of its names.
ALIASES = {
    "q": ("q", "query", "q_proj", "to_q"),
    "k": ("k", "key", "k_proj", "to_k"),
    "v": ("v", "value", "v_proj", "to_v"),
    "proj": ("proj", "o_proj", "out_proj", "attention.output.dense"),
    "fc1": ("fc1", "intermediate.dense", "mlp.0"),
    "fc2": ("fc2", "[0-9].output.dense", "[0-9][0-9].output.dense", "mlp.3"),
}


class Target(NamedTuple):
    """A linear layer, or some columns of its output, to adapt."""

    path: str  # of the projection: a slice of `attn.qkv` is called `attn.q`
    module: str
    columns: tuple[int, int]  # (start, width)


def find_targets(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """The projections of a model that `names` mean, in the order of the model.

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
    for name in names:
        matched = _meant(candidates, name)
        if not matched:
            linears = sorted({target.path.rpartition(".")[2] for target in candidates})
            raise ValueError(f"target {name!r} finds no linear layer; the last names of those there are: {linears}")
        meant.update(matched)
    found = [target for target in candidates if target in meant]
    whole = {target.module for target in found if target.path == target.module}
    for target in found:
        if target.path != target.module:
            fused = target.module.rpartition(".")[2]
            if _interleaves(model.get_submodule(target.module.rpartition(".")[0]), target):
                raise ValueError(
                    f"{target.module} does not hold {', '.join(fused)} one after the other in equal parts: adapt it "
                    f"whole, as {fused!r}"
                )
            if target.module in whole:
                raise ValueError(f"{target.module} and its slice {target.path} are both targets: choose one of them")
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
    """The projections that a name matches; a fused layer as a whole, where a pattern matches that and its slices."""
    ends = ALIASES.get(name, (name,))
    patterns = [pattern for end in ends for pattern in (end, f"*.{end}")]
    matched = [target for target in candidates if any(fnmatchcase(target.path, pattern) for pattern in patterns)]
    whole = {target.module for target in matched if target.path == target.module}
    return [target for target in matched if target.path == target.module or target.module not in whole]
