"""A federated round: the local epoch of many clients, together, one by one, as a loop over PEFT models, and in Flower.

All start from the same adapters, see the same images in the same order, and must arrive at the same adapters. Flower
takes part where it is installed: `pip install -r benchmarks/peers/requirements.txt`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import cost
from benchmarks.contest import Contestant, contest
from benchmarks.federation import Federation
from benchmarks.ledger import Ledger
from benchmarks.peers.peft_loop import PeftLoop
from benchmarks.shapes import Round
from benchmarks.timing import DEVICE
from hilora.federated.engine.batched import Task
from hilora.federated.engine.device import quick_dtype

# AdamW's first steps are signs of gradients, however small these are. An update left out is off by 1, another by 1.4.
FP32, BF16 = 5e-2, 0.8


def test_round(benchmark: Any, ledger: Ledger, shape: Round) -> None:
    federation = Federation(shape, torch.device(DEVICE))
    quick = quick_dtype(federation.device, federation.backbone.features)
    as_it_comes = loop(federation)
    expected = as_it_comes()
    steps = {
        "hilora": (ours(federation, None, quick), FP32 if quick == torch.float32 else BF16),
        "hilora, fp32": (ours(federation, None, torch.float32), FP32),
        "hilora, one by one": (ours(federation, 1, quick), FP32 if quick == torch.float32 else BF16),
        "PEFT loop": (as_it_comes, FP32),
        "PEFT loop, tuned": (loop(federation, tuned=True), BF16),
        "PEFT loop, merged + 1, tuned": (loop(federation, merged=True, tuned=True), BF16),
    }
    flower = None
    if find_spec("flwr") and ledger.scale != "toy":
        from benchmarks.peers.flower_round import FlowerRounds

        flower = FlowerRounds(federation)
        steps["Flower, PEFT"] = (flower.round, FP32)
    least = cost.local_epoch(shape, federation.tokens, federation.backbone.features, federation.depth)
    rivals = {name: Contestant(step, step, least, tolerance) for name, (step, tolerance) in steps.items()}
    what = {"op": "round", "phase": "step", **shape._asdict(), "dtype": str(quick).removeprefix("torch.")}
    try:
        contest(
            benchmark, ledger, what, rivals, [()], {"": [value.double() for value in expected]}, quick, capture=False
        )
    finally:
        if flower is not None:
            flower.close()


def ours(federation: Federation, size: int | None, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """B of the leaves and weights of the heads, after a local epoch of cohorts of that size."""
    cohort, ids = federation.cohort(size, dtype), torch.arange(federation.shape.clients)
    data = federation.images, federation.shares, federation.models
    train = partial(cohort.train, *data, Task("leaf"), ids, "training")

    def step() -> list[Tensor]:
        trained = train()
        return [trained.adapters["B0"], trained.head["weight"]]

    return step


def loop(federation: Federation, **options: bool) -> Callable[[], list[Tensor]]:
    """The same by a loop over clients."""
    peft = PeftLoop(federation, **options)
    orders = federation.orders()

    def step() -> list[Tensor]:
        adapters, head = peft.train(federation.images, orders, federation.models)
        return [adapters["B0"], head["weight"]]

    return step
