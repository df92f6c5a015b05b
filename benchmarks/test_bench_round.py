"""A federated round: the local epoch of many clients, together, one by one, and as a loop over clients with PEFT.

All start from the same adapters, see the same images in the same order, and must arrive at the same adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks import cost
from benchmarks.contest import Contestant, contest
from benchmarks.ledger import Ledger
from benchmarks.peers.peft_loop import PeftLoop
from benchmarks.shapes import Round
from benchmarks.timing import DEVICE
from hilora.federated.backbone import Backbone
from hilora.federated.capacity import quick_dtype
from hilora.federated.cohort import Cohort
from hilora.federated.data import ImageSet
from hilora.federated.settings import RunConfig
from hilora.federated.state import Models, State, Table, stream

CLASSES = 100
TIERS = ("root", "cluster", "leaf")
TOLERANCE = {True: (5e-2,), False: (0.5,)}  # of AdamW's first steps, which are signs of gradients however small; 16 bit


def test_round(benchmark: Any, ledger: Ledger, shape: Round) -> None:
    device = torch.device(DEVICE)
    backbone, images, shares = vit(shape), noise(shape), shape.shares()
    ids = torch.arange(shape.clients)
    run = RunConfig(batch_size=shape.batch, target_modules=("qkv",))
    quick = quick_dtype(device, backbone.features)
    models = start(Cohort(backbone, TIERS, run, device, torch.float32), shape.clients)

    def ours(size: int | None, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        cohort = Cohort(backbone, TIERS, replace(run, cohort_size=size), device, dtype)

        def train() -> list[Tensor]:
            trained = cohort.train(images, shares, models, "leaf", 1, ids, "training")
            return [trained.adapters["B0"], trained.head["weight"]]

        return train

    orders = [
        share[torch.randperm(len(share), generator=stream(run.seed, "training", 0, client))]
        for client, share in enumerate(shares)
    ]

    def loop(merged: bool, autocast: bool) -> Callable[[], list[Tensor]]:
        peft = PeftLoop(backbone, run, CLASSES, merged, autocast, device)

        def train() -> list[Tensor]:
            adapters, head = peft.train(images, orders, models)
            return [adapters["B0"], head["weight"]]

        return train

    expected = loop(merged=False, autocast=False)()
    vision: Any = backbone.model
    least = cost.local_epoch(shape, vision.pos_embed.shape[1], backbone.features, len(vision.blocks))
    steps = {
        "hilora": ours(None, quick),
        "hilora, fp32": ours(None, torch.float32),
        "hilora, one by one": ours(1, quick),
        "PEFT loop": loop(merged=False, autocast=False),
        "PEFT loop, autocast": loop(merged=False, autocast=True),
        "PEFT loop, merged + 1, autocast": loop(merged=True, autocast=True),
    }
    exact = {"hilora, fp32", "PEFT loop"}
    rivals = {name: Contestant(step, step, least, *TOLERANCE[name in exact]) for name, step in steps.items()}
    what = {"op": "round", "phase": "step", **shape._asdict(), "dtype": str(quick).removeprefix("torch.")}
    contest(benchmark, ledger, what, rivals, [()], {"": [value.double() for value in expected]}, quick)


def vit(shape: Round) -> Backbone:
    """With random weights: they make no difference to the time."""
    torch.manual_seed(0)
    model = timm.create_model(shape.model, num_classes=0, img_size=shape.size)
    return Backbone(model, shape.model, shape.size, torch.full((3,), 0.5), torch.full((3,), 0.25), model.num_features)


def noise(shape: Round) -> ImageSet:
    """Images of the size of CIFAR's."""
    generator = torch.Generator().manual_seed(0)
    count = shape.clients * shape.images
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return ImageSet(pixels, labels, tuple(map(str, range(CLASSES))), "noise")


def start(cohort: Cohort, clients: int) -> Models:
    """Root and cluster adapters that do something, leaves that do nothing yet."""
    generator = torch.Generator().manual_seed(0)
    tiers = {}
    for tier, slots in zip(TIERS, (1, min(4, clients), clients), strict=True):
        state = cohort.fresh(tier, slots, generator)
        if tier != "leaf":
            state["B0"].normal_(std=0.02, generator=generator)
        tiers[tier] = Table(state, torch.arange(clients) % slots)
    features = cohort.backbone.features
    head: State = {"weight": torch.zeros(1, CLASSES, features), "bias": torch.zeros(1, CLASSES)}
    return Models(tiers, Table(head, torch.zeros(clients, dtype=torch.long)))
