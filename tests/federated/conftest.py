"""A federation small enough to train in a test: coloured squares, a random ViT of two blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Client, Population
from hilora.federated.settings import RunConfig
from hilora.federated.simulation import Simulation
from hilora.models.backbone import Backbone

CLASSES = 6


def squares(count: int, seed: int) -> ImageSet:
    """Noisy images with a bright square whose place is the class; three superclasses of two."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 120, (count, 3, 16, 16), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 3)
        image[:, row * 8 : row * 8 + 5, column * 5 : column * 5 + 5] += 110
    names = tuple(f"place {i}" for i in range(CLASSES))
    groups = torch.arange(CLASSES) // 2
    return ImageSet(images.to(torch.uint8), labels, names, "squares", groups, ("a", "b", "c"), mirrors=False)


def population(sizes: list[int], test: ImageSet, unseen: int = 0) -> Population:
    """Clients with given numbers of training images, one after the other from the training set; the last are unseen."""
    clients, start = [], 0
    for index, size in enumerate(sizes):
        train = torch.arange(start, start + size)
        val = torch.arange(start + size, start + size + 2)
        start += size + 2
        tests = torch.arange(index, len(test), 7)
        clients.append(Client(train, val, tests, index % 3, index < len(sizes) - unseen))
    return Population(tuple(clients), "by hand", ("a", "b", "c"))


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    return Backbone(model, "tiny", 16, torch.full((3,), 0.5), torch.full((3,), 0.25), 24)


@pytest.fixture
def double() -> Iterator[None]:
    """Everything that is made is fp64, so that rounding hides nothing."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


Simulate = Callable[..., Simulation]


@pytest.fixture
def simulate(backbone: Backbone, tmp_path: Path) -> Simulate:
    """Builds a simulation on the squares."""

    def build(strategy: str = "hilora", out: Path = tmp_path / "out", **options: Any) -> Simulation:
        sizes = options.pop("sizes", [12, 9, 12, 5, 8, 7])
        unseen = options.pop("unseen", 1)
        resume = options.pop("resume", False)
        fields: dict[str, Any] = {"rounds": [3, 2, 1], "batch_size": 4, "rank": 2, "cohort_size": 3, "unseen_epochs": 1}
        train, test = squares(120, 1), squares(42, 2)
        people = population(sizes, test, unseen)
        run = RunConfig(**(fields | options))
        dtype = torch.get_default_dtype()
        return Simulation(strategy, run, backbone, train, test, people, out, torch.device("cpu"), dtype, resume)

    return build


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    """Whether two states have the same tensors."""
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=tolerance, atol=tolerance) for k in a)
