"""Clients to train: a ViT, images, and adapters to start from; what an epoch of theirs is, and what it must come to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from benchmarks.cost import Cost
from hilora.adapters.config import HiLoRAConfig
from hilora.federated.client import Models, Trained
from hilora.federated.data.images import ImageSet
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.engine.blocks import Parts
from hilora.federated.engine.device import quick_dtype
from hilora.federated.engine.shared_pass import Task
from hilora.federated.local.sgd import LocalSGD
from hilora.federated.protocol import Head, Rows, shared
from hilora.federated.settings import TIERS, TrainingSettings
from hilora.federated.streams import stream
from hilora.models.backbone import Backbone

GAMMAS = {"root": 0.1, "cluster": 0.1}
LEAVES = Task("leaf", LocalSGD(), epochs=1, rates="leaf", penalty=tuple(GAMMAS.items()))
# AdamW's first steps are signs of gradients, however small these are. An update left out is off by 1, another by 1.4.
TOLERANCE = {torch.float32: 5e-2, torch.bfloat16: 0.8}


class Round(NamedTuple):
    """A local epoch of many clients."""

    model: str  # a ViT of timm with a fused qkv
    size: int  # height and width of its images
    clients: int
    images: int  # of each client
    batch: int = 16


class Federation:
    """The leaf stage of a federation: a root for all, up to four cluster adapters, and leaves that do nothing yet.

    Args:
        shape: how many clients with how many images, and their ViT.
        device: where to train.
        backbone: with its weights; by default random ones, which make no difference to the time.
        images: of all clients, who have equal shares; by default random ones.
        noise: standard deviation of B of the root and of the clusters.
        targets: the adapted projections: whole `qkv`, or q and v by themselves.
    """

    def __init__(
        self,
        shape: Round,
        device: torch.device,
        backbone: Backbone | None = None,
        images: ImageSet | None = None,
        shares: list[Tensor] | None = None,
        noise: float = 0.02,
        targets: tuple[str, ...] = ("qkv",),
    ) -> None:
        self.shape, self.device = shape, device
        self.settings = TrainingSettings(batch_size=shape.batch, target_modules=targets)
        self.backbone = backbone or _random_vit(shape)
        model: Any = self.backbone.model
        self.tokens, self.depth = model.pos_embed.shape[1], len(model.blocks)
        self.images = images or _random_images(shape.clients * shape.images)
        self.images = self.images.to(device)
        self.shares = shares or list(torch.arange(shape.clients * shape.images).view(shape.clients, shape.images))
        self.models = self._start(torch.Generator().manual_seed(0), noise)

    def engine(self, size: int | None, dtype: torch.dtype) -> BatchedEngine:
        """Trains so many clients at once."""
        settings = self.settings.changed(clients_at_once=size)
        config = HiLoRAConfig(r=settings.rank, lora_alpha=settings.lora_alpha, target_modules=settings.target_modules)
        return BatchedEngine(self.backbone, config, settings, self.device, dtype)

    @property
    def quick(self) -> torch.dtype:
        """In which the device trains best."""
        return quick_dtype(self.device, self.backbone.features)

    @property
    def cost(self) -> Cost:
        """Of a local epoch of all clients."""
        return local_epoch(self.shape, self.tokens, self.backbone.features, self.depth)

    def epoch(
        self, size: int | None, dtype: torch.dtype, models: Models | None = None, parts: Parts | None = None
    ) -> Callable[[], list[Tensor]]:
        """A local epoch of so many clients at once: gives B of the leaves and weights of the heads after it. They may
        start from other models, and train or have some of the blocks."""
        engine, ids = self.engine(size, dtype), torch.arange(self.shape.clients)
        start = models or self.models
        train = partial(engine.train, self.images, self.shares, start, LEAVES, ids, "training", parts=parts)

        def step() -> list[Tensor]:
            trained: Trained = train()
            return [trained.tiers["leaf"].B[0], trained.head.weight]

        return step

    def orders(self, round: int = 0) -> list[Tensor]:
        """The clients' images in the order in which the engine takes them."""
        streams = [stream(self.settings.seed, "training", round, client) for client in range(self.shape.clients)]
        return [
            share[torch.randperm(len(share), generator=own)] for share, own in zip(self.shares, streams, strict=True)
        ]

    def _start(self, generator: torch.Generator, noise: float) -> Models:
        clients, tiers = self.shape.clients, {}
        engine = self.engine(None, torch.float32)
        for tier, slots in zip(TIERS, (1, min(4, clients), clients), strict=True):
            table = engine.fresh(tier, slots, generator)
            if tier != "leaf":
                table.B[0].normal_(std=noise, generator=generator)
            tiers[tier] = Rows(table, torch.arange(clients) % slots)
        classes = len(self.images.classes)
        head = Head(torch.zeros(1, classes, self.backbone.features), torch.zeros(1, classes))
        return Models(tiers, shared(head, torch.arange(clients)))


def local_epoch(shape: Round, tokens: int, width: int, depth: int) -> Cost:
    """Forward and backward of the frozen ViT for each image: no gradients of weights, so twice the forward pass.

    A block takes `2·T·12w²` FLOPs for its linear layers and `4·T²w` for attention. Everything else counts nothing. So
    `floor / time` is the share of the device's rate of products that a training reaches, as FLOPs are usually counted:
    that the last block may leave out all but the class token is not taken off.
    """
    forward = depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    return Cost(((2 * forward * shape.clients * shape.images, 0),))


def _random_vit(shape: Round) -> Backbone:
    torch.manual_seed(0)
    model: Any = timm.create_model(shape.model, num_classes=0, img_size=shape.size)
    mean = torch.full((3,), 0.5)
    return Backbone(model, shape.model, shape.size, mean, mean / 2, model.num_features)


def _random_images(count: int) -> ImageSet:
    """Of the size of CIFAR-100's."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 100, (count,), generator=generator)
    return ImageSet(pixels, labels, tuple(map(str, range(100))), "noise")
