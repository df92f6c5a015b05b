"""Layers that hold several projections, such as q, k and v, one after the other in their output."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hilora.models.attention import PACKED

HOLDS = {
    "qkv": "qkv",
    "to_qkv": "qkv",  # of torchvision's MaxViT
    "Wqkv": "qkv",
    "queries_keys_values": "qkv",  # of LeViT in transformers
    "kv": "kv",
    "to_kv": "kv",
    "keys_values": "kv",
    "qk": "qk",
}

INNER = ("linear",)  # a layer in a module of its own, with a normalisation


def slices(model: nn.Module, path: str, out: int) -> Mapping[str, tuple[int, int]]:
    """What a layer holds: for each of q, k, v its first column, and how many; nothing where it is no fused layer.

    Args:
        model: where it is.
        path: of the layer.
        out: its width.
    """
    attention, name = _attention(model, path)
    split = getattr(attention, "in_split", None)
    if name == "in_proj" and isinstance(split, list) and len(split) == 4 and sum(split) == out:
        mlp, width = split[:2]  # a parallel block of timm: the MLP's first layer comes before q, k and v
        return {part: (mlp + index * width, width) for index, part in enumerate("qkv")}
    if name == PACKED and isinstance(attention, nn.MultiheadAttention):
        return {part: (index * out // 3, out // 3) for index, part in enumerate("qkv")}
    parts = HOLDS.get(name, "")
    if parts == "qkv" and out == 2 * _values(attention, out):
        parts = "kv"  # a global attention of GCViT, to which q is given
    if not parts or (out % len(parts) and not _by_head(attention)):
        return {}
    width = out // len(parts)
    return {part: (index * width, width) for index, part in enumerate(parts)}


def mixes(model: nn.Module, path: str, width: int) -> bool:
    """Whether a fused layer, with slices of a width, mixes its parts head by head, or has parts of several widths: so
    in timm's MaxViT, and where keys have a width of their own (TinyViT, EfficientFormer, LeViT)."""
    attention, name = _attention(model, path)
    return name in HOLDS and (_by_head(attention) or ("v" in HOLDS[name] and _values(attention, width) != width))


def _by_head(attention: nn.Module) -> bool:
    return bool(getattr(attention, "head_first", False)) or hasattr(attention, "key_dim")


def _attention(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a layer is part of, and what it is called there."""
    parent, _, name = path.rpartition(".")
    if name in INNER and parent:
        parent, _, name = parent.rpartition(".")
    return model.get_submodule(parent), name


def _values(attention: nn.Module, default: int) -> int:
    """How wide the values are: what the layer after the attention takes."""
    after = getattr(attention, "proj", None) or getattr(attention, "merge", None)
    return int(getattr(after, "in_features", default))
