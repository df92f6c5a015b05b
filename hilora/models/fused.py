"""Layers that hold several projections, such as q, k and v, in their output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hilora.models.attention import PACKED
from hilora.models.pointwise import widths

HOLDS = {
    "qkv": "qkv",
    "qkvs": "qkv",  # a list with one a head, of EfficientViT of MSRA
    "qkv_proj": "qkv",  # of MobileViT V2
    "to_qkv": "qkv",  # of torchvision's MaxViT
    "Wqkv": "qkv",
    "queries_keys_values": "qkv",  # of LeViT in transformers
    "kv": "kv",
    "to_kv": "kv",
    "keys_values": "kv",
    "qk": "qk",
}

INNER = ("linear", "conv")  # a layer in a module of its own, with a normalisation


class Fused(NamedTuple):
    """What a layer holds.

    Attributes:
        parts: how many features each projection has in each head, in their order; 0 where that cannot be told.
        heads: how many times they come, one head after the other.
        start: of the first.
    """

    parts: Mapping[str, int]
    heads: int = 1
    start: int = 0

    def columns(self) -> dict[str, tuple[int, int]]:
        """Where each projection would be, (start, width), if its heads were side by side."""
        found, start = {}, self.start
        for part, width in self.parts.items():
            found[part] = (start, width * self.heads)
            start += width * self.heads
        return found

    def order(self) -> Tensor | None:
        """Where in the output the columns really are, int64 `[out]`; None where they are in this order."""
        if self.heads == 1:
            return None
        rows = torch.arange(self.start, self.start + self.heads * sum(self.parts.values())).view(self.heads, -1)
        return torch.cat([part.flatten() for part in rows.split(list(self.parts.values()), 1)])


def fused(model: nn.Module, path: str, out: int) -> Fused | None:
    """What a layer holds; None where it is no fused layer.

    Args:
        model: where it is.
        path: of the layer.
        out: its width.
    """
    attention, name, of_one_head = _attention(model, path)
    split = getattr(attention, "in_split", None)
    if name == "in_proj" and isinstance(split, list) and len(split) == 4 and sum(split) == out:
        mlp, width = map(int, split[:2])  # a parallel block of timm: the MLP's first layer comes before q, k and v
        return Fused(dict.fromkeys("qkv", width), start=mlp)
    if name == PACKED and isinstance(attention, nn.MultiheadAttention):
        return Fused(dict.fromkeys("qkv", out // 3))
    parts = HOLDS.get(name, "")
    if not parts:
        return None
    key = _key_width(attention)
    if key is not None:
        return _mixed(parts, key, 1 if of_one_head else _heads(attention, key, out), out)
    if out == 1 + 2 * getattr(attention, "embed_dim", 0):
        return Fused({"q": 1, "k": out // 2, "v": out // 2})  # a linear attention of MobileViT V2
    taken = _taken_afterwards(attention, out)
    if parts == "qkv" and out == 2 * taken:
        parts = "kv"  # a global attention of GCViT, to which q is given
    if out % len(parts):
        return None
    even = not getattr(attention, "head_first", False) and ("v" not in parts or taken in (out, out // len(parts)))
    return Fused(dict.fromkeys(parts, out // len(parts) if even else 0))


def _attention(model: nn.Module, path: str) -> tuple[nn.Module, str, bool]:
    """The module that a layer is part of, what it is called there, and whether it is one of a list."""
    parent, _, name = path.rpartition(".")
    listed = False
    if name in INNER and parent:
        parent, _, name = parent.rpartition(".")
        listed = name.isdigit() and bool(parent)
    if listed:
        parent, _, name = parent.rpartition(".")
    return model.get_submodule(parent), name, listed


def _mixed(parts: str, key: int, heads: int, out: int) -> Fused:
    """What a layer holds where heads come one after the other, of which keys have a width."""
    values = out // heads - key * (len(parts) - 1) if heads else 0
    each = {part: values if part == "v" else key for part in parts}
    told = heads * sum(each.values()) == out and values > 0
    return Fused(each, heads) if told else Fused(dict.fromkeys(parts, 0))


def _key_width(attention: nn.Module) -> int | None:
    """How wide a head's keys are, where q, k and v are mixed head by head: in timm's MaxViT, in the linear attention of
    EfficientViT, and where keys have a width of their own (TinyViT, EfficientFormer, LeViT)."""
    name = (
        "dim_head" if getattr(attention, "head_first", False) else "dim" if hasattr(attention, "aggreg") else "key_dim"
    )
    found = getattr(attention, name, None)
    return found if isinstance(found, int) else None


def _heads(attention: nn.Module, key: int, out: int) -> int:
    """How many heads an attention has; 0 where it does not say so."""
    if not hasattr(attention, "key_dim"):
        return out // (3 * key)  # all parts are as wide as the keys
    found = getattr(attention, "num_heads", getattr(attention, "num_attention_heads", 0))
    return int(found)


def _taken_afterwards(attention: nn.Module, default: int) -> int:
    """How wide the values are: what the layer after the attention takes."""
    after = widths(getattr(attention, "proj", None) or getattr(attention, "merge", None))
    return after[0] if after else default
