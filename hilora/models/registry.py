"""Families of models: what one has to know of a library to adapt its ViTs and to load them by name.

A family is a class in one file of `hilora/models/families/`; nothing else names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hilora.discovery import find_classes
from hilora.models.wrappers import own_class

if TYPE_CHECKING:
    from hilora.models.backbone import Backbone


class Family:
    """A library of models; by itself, what is known of a user's own module.

    Attributes:
        name: of the library.
        aliases: for each of the names q, k, v, qkv, proj, fc1, fc2 that targets can have, what the library calls these
            layers: ends of paths, or patterns for them.
    """

    name: ClassVar[str]
    aliases: ClassVar[Mapping[str, Sequence[str]]] = {}

    def owns(self, model: nn.Module) -> bool:
        """Whether a model is of this family."""
        return True

    def title(self, model: nn.Module) -> str:
        """What a model is called."""
        return own_class(model).__name__

    def heads(self, model: nn.Module) -> list[nn.Module]:
        """The classifiers of a model; none where it has no head."""
        found = [getattr(model, name, None) for name in ("classifier", "heads", "head")]
        return [head for head in found if isinstance(head, nn.Module)]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Height and width of the images that a model takes; None where it is not known."""
        return None

    def example(self, model: nn.Module) -> Tensor | None:
        """One image `[1, channels, height, width]` for a model; None where it is not known what it takes."""
        stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        size = self.image_size(model)
        if stem is None or size is None:
            return None
        image = torch.rand(1, stem.in_channels, *size, generator=torch.Generator().manual_seed(0))
        return image.to(stem.weight.device, stem.weight.dtype)

    def knows(self, name: str) -> bool:
        """Whether `load` has a model of this name."""
        return False

    def load(self, name: str, weights: Path | None, size: int | None) -> Backbone:
        """A pretrained model, see `hilora.models.backbone.load_backbone`."""
        raise NotImplementedError


@cache
def families() -> tuple[Family, ...]:
    """All of the folder, in the order of their files' names."""
    from hilora.models import families as folder

    return tuple(kind() for kind in find_classes(folder.__name__, folder.__path__, Family).values())


def family_of(model: nn.Module) -> Family:
    """The family that a model is of."""
    return next((family for family in families() if family.owns(model)), Family())


def aliases() -> dict[str, list[str]]:
    """What all libraries call the layers of a block: a user's module may hold models of several."""
    found = {name: [name] for name in ("q", "k", "v", "qkv", "proj", "fc1", "fc2")}
    for family in families():
        for name, ends in family.aliases.items():
            found[name].extend(ends)
    return found


def pair(size: Any) -> tuple[int, int] | None:
    """A height and width from a number, a sequence, or nothing."""
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return int(height), int(width)
