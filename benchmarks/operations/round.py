"""A federated round: the local epoch of many clients, together, one by one, as a loop over PEFT models, and in Flower.

All start from the same adapters, see the same images in the same order, and must arrive at the same adapters. Flower
takes part where it is installed: `pip install -r benchmarks/peers/requirements.txt`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.contest import Contestant, Lineup
from benchmarks.federation import TOLERANCE, Federation, Round
from benchmarks.operations import Operation
from benchmarks.timing import DEVICE


def lineup(shape: Round, phase: str, scale: str) -> Lineup:
    federation = Federation(shape, torch.device(DEVICE))
    quick, full = federation.quick, torch.float32
    as_it_comes = loop(federation)
    expected = [value.double() for value in as_it_comes()]
    steps = {
        "hilora": (federation.epoch(None, quick), quick),
        "hilora, fp32": (federation.epoch(None, full), full),
        "hilora, one by one": (federation.epoch(1, quick), quick),
        "PEFT loop": (as_it_comes, full),
        "PEFT loop, tuned": (loop(federation, tuned=True), torch.bfloat16),
        "PEFT loop, merged + 1, tuned": (loop(federation, merged=True, tuned=True), torch.bfloat16),
    }
    flower = None
    if find_spec("flwr") and scale != "toy":
        from benchmarks.peers.flower_process import FlowerProcess

        flower = FlowerProcess(shape)
        steps["Flower, PEFT"] = (flower.round, full)
    rivals = {name: Contestant(step, step, federation.cost, TOLERANCE[dtype]) for name, (step, dtype) in steps.items()}
    found = Lineup(rivals, {"": expected}, dtype=quick, capture=False)
    return found if flower is None else found._replace(close=flower.close)


def loop(federation: Federation, **options: bool) -> Callable[[], list[Tensor]]:
    """The same as `Federation.epoch` by a loop over clients."""
    from benchmarks.peers.peft_loop import PeftLoop  # loads PEFT

    peft = PeftLoop(federation, **options)
    orders = federation.orders()

    def step() -> list[Tensor]:
        adapters, head = peft.train(federation.images, orders, federation.models)
        return [adapters.B[0], head.weight]

    return step


def shapes(scale: str) -> list[Round]:
    if scale == "toy":
        return [Round("test_vit", 160, 3, 4, batch=2)]
    if scale == "cpu":
        return [Round("deit_tiny_patch16_224", 96, 20, 32)]
    return [Round("deit_tiny_patch16_224", 224, 32, 64, 32), Round("vit_base_patch16_224", 224, 16, 64, 32)]


OPERATION = Operation("A local epoch of many clients", Round, shapes, lineup, place=2)
