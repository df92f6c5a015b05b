"""Which shapes are measured, the most telling first: a budget of time cuts the list from its end."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch

TOKENS = 197  # of a ViT/16 at 224 px, with its class token
SCALES = ("toy", "cpu", "cuda")
WIDTHS = {"ViT-Ti": 192, "ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}


class Layer(NamedTuple):
    """The q, k and v of an attention layer with adapters on q and v."""

    width: int
    rows: int  # of all groups together
    form: str = "qkv"  # one layer, as in timm; or "q, k, v", three layers, as in transformers
    groups: int = 1  # clients, each with adapters of its own
    rank: int = 8
    tiers: int = 3
    dtype: str = "float32"
    compiled: bool = False  # whether to compare with compiled PEFT, which takes seconds for each shape

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class Penalty(NamedTuple):
    width: int
    depth: int = 12  # blocks; twice as many projections
    rank: int = 8


class Distances(NamedTuple):
    clients: int
    width: int = 192
    projections: int = 24
    rank: int = 8


class Round(NamedTuple):
    """A local epoch of many clients."""

    model: str  # a ViT of timm with a fused qkv
    size: int  # height and width of its images
    clients: int
    images: int  # of each client
    batch: int = 16


def layers(scale: str) -> list[Layer]:
    if scale == "toy":
        return [Layer(32, 24, compiled=True), Layer(32, 24, "q, k, v"), Layer(32, 24, groups=2, tiers=2)]
    if scale == "cpu":
        centre = Layer(192, 16 * TOKENS, compiled=True)
        return _distinct(
            [centre._replace(width=width) for width in (192, 384, 768)]
            + [centre._replace(form="q, k, v", width=width) for width in (192, 384, 768)]
            + [centre._replace(groups=groups, compiled=False) for groups in (4, 16)]
            + [centre._replace(tiers=tiers) for tiers in (1, 2)]
            + [centre._replace(rows=images * TOKENS) for images in (1, 4, 64)]
            + [centre._replace(rank=rank) for rank in (4, 16, 32)]
            + [centre._replace(rows=4 * TOKENS, width=width) for width in (384, 768, 1024)]
            + [centre._replace(rows=4 * TOKENS, width=768, groups=4, compiled=False)]
        )
    centre = Layer(768, 64 * TOKENS, dtype="bfloat16", compiled=True)
    plain = centre._replace(compiled=False)
    rows = [64 * TOKENS, 1024, 256 * TOKENS]
    return _distinct(
        [centre, plain._replace(groups=16), plain._replace(groups=4)]
        + [centre._replace(width=width) for width in WIDTHS.values()]
        + [centre._replace(rows=count) for count in rows]
        + [centre._replace(form="q, k, v"), plain._replace(dtype="float32")]
        + [plain._replace(tiers=tiers) for tiers in (1, 2)]
        + [plain._replace(rank=rank) for rank in (4, 16, 32)]
        + [
            plain._replace(width=width, rows=count, groups=groups)
            for groups, count, width in product((1, 4, 16), rows, WIDTHS.values())
        ]
    )


def penalties(scale: str) -> list[Penalty]:
    if scale == "toy":
        return [Penalty(32, depth=2, rank=4)]
    widths = [768, 192, 384] if scale == "cpu" else [768, 192, 384, 1024]
    return [Penalty(width) for width in widths] + [Penalty(widths[0], rank=rank) for rank in (4, 16, 32)]


def distances(scale: str) -> list[Distances]:
    if scale == "toy":
        return [Distances(6, width=16, projections=2, rank=2)]
    if scale == "cpu":
        return [Distances(100), Distances(25), Distances(1000, projections=2)]
    return [Distances(clients, width=width) for clients in (1000, 100, 5000) for width in (768, 192)]


def rounds(scale: str) -> list[Round]:
    if scale == "toy":
        return [Round("test_vit", 160, 3, 4, batch=2)]
    if scale == "cpu":
        return [Round("deit_tiny_patch16_224", 96, 20, 32)]
    return [Round("deit_tiny_patch16_224", 224, 32, 64, 32), Round("vit_base_patch16_224", 224, 16, 64, 32)]


def cohorts(scale: str) -> list[Round]:
    if scale == "toy":
        return [Round("test_vit", 160, 3, 4, batch=2)]
    if scale == "cpu":
        return [Round("deit_tiny_patch16_224", 96, 16, 16, batch=8)]
    return [Round("deit_tiny_patch16_224", 224, 64, 64, 32)]


def populations(scale: str) -> list[Round]:
    """Of so many images that a hundred times as many clients still fill a batch each."""
    if scale == "toy":
        return [Round("test_vit", 160, 1, 10, batch=1)]
    if scale == "cpu":
        return [Round("deit_tiny_patch16_224", 48, 10, 40, batch=4)]
    return [Round("deit_tiny_patch16_224", 224, 10, 1600, batch=16)]


def _distinct(shapes: list[Layer]) -> list[Layer]:
    """Each shape once, however its rivals differ."""
    found: dict[Layer, Layer] = {}
    for shape in shapes:
        found.setdefault(shape._replace(compiled=False), shape)
    return list(found.values())
