"""Ten and a hundred times as many clients with the same images between them, in cohorts of one size.

Each client trains its own adapter, so there is no common result; that each is right, other tests say.
"""

from __future__ import annotations

import torch

from benchmarks.contest import Contestant, Lineup
from benchmarks.federation import Federation, Round
from benchmarks.operations import Operation
from benchmarks.timing import DEVICE


def lineup(shape: Round, phase: str, scale: str) -> Lineup:
    rivals = {}
    dtype = torch.float32
    for more in (1, 10, 100):
        if shape.images < more * shape.batch:
            continue
        part = shape._replace(clients=more * shape.clients, images=shape.images // more)
        federation = Federation(part, torch.device(DEVICE))
        dtype = federation.quick
        name = "hilora" if more == 1 else f"{part.clients} clients"
        rivals[name] = Contestant(federation.epoch(shape.clients, dtype), lambda: [], federation.cost, 0.0)
    return Lineup(rivals, {"": []}, dtype=dtype, capture=False)


def shapes(scale: str) -> list[Round]:
    """Of so many images that a hundred times as many clients still fill a batch each."""
    if scale == "toy":
        return [Round("test_vit", 160, 1, 10, batch=1)]
    if scale == "cpu":
        return [Round("deit_tiny_patch16_224", 48, 10, 40, batch=4)]
    return [Round("deit_tiny_patch16_224", 224, 10, 1600, batch=16)]


OPERATION = Operation("The same images shared out among more clients", Round, shapes, lineup, place=4)
