"""A local epoch beside the quickest loop over PEFT models: transformers' ViT, on tensors, without loading of data.

The loop is measured in both dtypes with both of transformers' attentions; its best is the rival that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from benchmarks.contest import Contestant, Lineup
from benchmarks.federation import TOLERANCE, Federation, Round
from benchmarks.operations import Operation
from benchmarks.timing import DEVICE


def lineup(shape: Round, phase: str, scale: str) -> Lineup:
    federation = Federation(shape, torch.device(DEVICE), targets=("q", "v"))
    quick = federation.quick
    steps = {"hilora": (federation.epoch(None, quick), quick)}
    for tuned, attention in product((True, False), ("eager", "sdpa")):
        dtype = torch.bfloat16 if tuned else torch.float32
        name = f"PEFT on tensors, {'bf16' if tuned else 'fp32'}, {attention}"
        steps[name] = loop(federation, tuned, attention), dtype
    expected = [value.double() for value in steps["PEFT on tensors, fp32, eager"][0]()]
    rivals = {name: Contestant(step, step, federation.cost, TOLERANCE[dtype]) for name, (step, dtype) in steps.items()}
    return Lineup(rivals, {"": expected}, dtype=quick, capture=False)


def loop(federation: Federation, tuned: bool, attention: str) -> Callable[[], list[Tensor]]:
    """The same as `Federation.epoch` by the loop."""
    from benchmarks.peers.tensor_loop import TensorLoop  # loads PEFT and transformers

    peft, orders = TensorLoop(federation, tuned, attention), federation.orders()

    def step() -> list[Tensor]:
        adapters, head = peft.train(federation.images, orders, federation.models)
        return [adapters.B[0], head.weight]

    return step


def shapes(scale: str) -> list[Round]:
    if scale == "toy":
        return [Round("test_vit", 160, 3, 4, batch=2)]
    if scale == "cpu":
        return [Round("deit_tiny_patch16_224", 96, 10, 32)]
    return [Round("deit_tiny_patch16_224", 224, 16, 64, 32)]


OPERATION = Operation("A local epoch beside PEFT on tensors", Round, shapes, lineup, place=2)
