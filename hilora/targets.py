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
    "fc2": ("fc2", "[0-9].output.dense", "mlp.3"),
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
    names = tuple(names)
    candidates = [
        target
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for target in _projections(path, module)
    ]
    for name in names:
        if not any(_matches(target.path, name) for target in candidates):
            linears = sorted({target.path.rpartition(".")[2] for target in candidates})
            raise ValueError(f"target {name!r} finds no linear layer; the last names of those there are: {linears}")
    found = [target for target in candidates if any(_matches(target.path, name) for name in names)]
    for target in found:
        if target.path != target.module:
            parent = model.get_submodule(target.module.rpartition(".")[0])
            if getattr(parent, "head_first", False):
                raise ValueError(f"{target.module} interleaves q, k and v head by head: adapt it whole, as 'qkv'")
            if any(other.path == target.module for other in found):
                raise ValueError(f"{target.module} and its slice {target.path} are both targets: choose one of them")
    return found


def _projections(path: str, module: nn.Linear) -> list[Target]:
    whole = [Target(path, path, (0, module.out_features))]
    parent, _, name = path.rpartition(".")
    if name != "qkv" or module.out_features % 3:
        return whole
    width = module.out_features // 3
    prefix = f"{parent}." if parent else ""
    return whole + [Target(f"{prefix}{part}", path, (i * width, width)) for i, part in enumerate("qkv")]


def _matches(path: str, name: str) -> bool:
    return any(fnmatchcase(path, end) or fnmatchcase(path, f"*.{end}") for end in ALIASES.get(name, (name,)))
