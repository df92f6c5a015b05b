"""Clients to train: a ViT, images, and adapters to start from."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks.shapes import Round
from hilora.federated.backbone import Backbone
from hilora.federated.cohort import Cohort
from hilora.federated.data import ImageSet
from hilora.federated.settings import RunConfig
from hilora.federated.state import Models, State, Table, stream

CLASSES = 100
TIERS = ("root", "cluster", "leaf")


class Federation:
    """The leaf stage of a federation: a root for all, up to four cluster adapters, and leaves that do nothing yet.

    Weights and images are random: they make no difference to the time.
    """

    def __init__(self, shape: Round, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.run = RunConfig(batch_size=shape.batch, target_modules=("qkv",))
        torch.manual_seed(0)
        model: Any = timm.create_model(shape.model, num_classes=0, img_size=shape.size)
        normal = torch.full((3,), 0.5)
        self.backbone = Backbone(model, shape.model, shape.size, normal, normal / 2, model.num_features)
        self.tokens, self.depth = model.pos_embed.shape[1], len(model.blocks)
        generator = torch.Generator().manual_seed(0)
        count = shape.clients * shape.images
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)  # as CIFAR's
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        self.images = ImageSet(pixels.to(device), labels, tuple(map(str, range(CLASSES))), "noise")
        self.shares = list(torch.arange(count).view(shape.clients, shape.images))
        self.models = self._start(generator)

    def cohort(self, size: int | None, dtype: torch.dtype) -> Cohort:
        run = RunConfig(**{**self.run.to_dict(), "cohort_size": size})
        return Cohort(self.backbone, TIERS, run, self.device, dtype)

    def order(self, client: int) -> Tensor:
        """A client's images in the order in which a cohort takes them."""
        share: Tensor = self.shares[client]
        return share[torch.randperm(len(share), generator=stream(self.run.seed, "training", 0, client))]

    def _start(self, generator: torch.Generator) -> Models:
        clients, tiers = self.shape.clients, {}
        cohort = self.cohort(None, torch.float32)
        for tier, slots in zip(TIERS, (1, min(4, clients), clients), strict=True):
            state = cohort.fresh(tier, slots, generator)
            if tier != "leaf":
                state["B0"].normal_(std=0.02, generator=generator)
            tiers[tier] = Table(state, torch.arange(clients) % slots)
        features = self.backbone.features
        head: State = {"weight": torch.zeros(1, CLASSES, features), "bias": torch.zeros(1, CLASSES)}
        return Models(tiers, Table(head, torch.zeros(clients, dtype=torch.long)))
