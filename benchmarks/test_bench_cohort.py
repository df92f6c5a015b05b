"""Clients trained together in one forward pass against one after the other."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.timing import ready, take_turns
from hilora.federated.backbone import load_backbone, tune_for_cpu
from hilora.federated.cohort import Cohort
from hilora.federated.glyphs import load_glyphs
from hilora.federated.settings import RunConfig
from hilora.federated.state import Models, Table, stream

CLIENTS, IMAGES = 10, 32


def test_a_local_epoch_of_ten_clients(benchmark) -> None:
    """`extra_info` has images per second; the timed function trains the ten in one cohort."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        tune_for_cpu()
    images, _ = load_glyphs()
    shares = list(torch.randperm(len(images))[: CLIENTS * IMAGES].view(CLIENTS, IMAGES))
    ids = torch.arange(CLIENTS)

    def epoch(cohort: Cohort) -> None:
        adapters = Table(cohort.fresh("root", 1, stream(0, "fresh adapters")), torch.zeros(CLIENTS, dtype=torch.long))
        head = {"weight": torch.zeros(1, 50, cohort.backbone.features), "bias": torch.zeros(1, 50)}
        models = Models({"root": adapters}, Table(head, adapters.slot))
        cohort.train(images, shares, models, "root", 1, ids, "training")

    cohorts = {
        size: Cohort(load_backbone("glyph_vit"), ("root",), RunConfig(cohort_size=size), device, torch.float32)
        for size in (1, CLIENTS)
    }
    steps = {str(size): partial(epoch, cohort) for size, cohort in cohorts.items()}
    timings = take_turns({size: ready(step, [()]) for size, step in steps.items()}, 3.0)
    seconds = {size: timing.seconds for size, timing in timings.items()}
    benchmark.extra_info["images/s together"] = CLIENTS * IMAGES / seconds[str(CLIENTS)]
    benchmark.extra_info["one by one / together"] = seconds["1"] / seconds[str(CLIENTS)]
    benchmark.pedantic(epoch, args=(cohorts[CLIENTS],), rounds=3)
