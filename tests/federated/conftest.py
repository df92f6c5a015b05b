"""A federation small enough to train in a test: coloured squares, a random ViT of two blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from hilora.adapters.table import Stack
from hilora.federated.callbacks.metrics import Metrics
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Client, Population
from hilora.federated.loop import Loop
from hilora.federated.settings import TrainingSettings
from hilora.federated.simulation import Simulation
from hilora.federated.strategies import STRATEGIES, Strategy
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
    """Builds a simulation on the squares; its options are those of `TrainingSettings`, of the strategy and of
    `Simulation`."""

    def build(strategy: str | type[Strategy] = "hilora", out: Path = tmp_path / "out", **options: Any) -> Simulation:
        kind = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
        train, test = options.pop("images", (squares(120, 1), squares(42, 2)))
        people = population(options.pop("sizes", [12, 9, 12, 5, 8, 7]), test, options.pop("unseen", 1))
        given = {name: options.pop(name) for name in ("resume", "callbacks", "arguments") if name in options}
        model, dtype = options.pop("backbone", backbone), options.pop("dtype", torch.get_default_dtype())
        fields: dict[str, Any] = {
            "rounds": [3, 2, 1],
            "batch_size": 4,
            "rank": 2,
            "clients_at_once": 3,
            "unseen_epochs": 1,
        }
        fields |= {name: options.pop(name) for name in list(options) if name in TrainingSettings.model_fields}
        settings, method = TrainingSettings(**fields), kind(**options)
        return Simulation(method, settings, model, train, test, people, out, torch.device("cpu"), dtype, **given)

    return build


def records(simulation: Loop) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says, a round each."""
    (metrics,) = (one for one in simulation.callbacks if isinstance(one, Metrics))
    return metrics.log.records


def same(a: Stack, b: Stack, tolerance: float = 0.0) -> bool:
    """Whether two stacks have the same tensors."""
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in one
    )


def copied(stack: Any) -> Any:
    """The same values in memory of their own."""
    return stack.each(torch.clone)
