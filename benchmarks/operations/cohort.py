"""A local epoch by the size of cohorts: of 1, 4, 16 and 64 clients; ours are as large as there is room for."""

from __future__ import annotations

import torch

from benchmarks.contest import Contestant, Lineup
from benchmarks.federation import TOLERANCE, Federation, Round
from benchmarks.operations import Operation
from benchmarks.timing import DEVICE


def lineup(shape: Round, phase: str, scale: str) -> Lineup:
    federation = Federation(shape, torch.device(DEVICE))
    dtype = federation.quick
    expected = [value.double() for value in federation.epoch(1, torch.float32)()]
    sizes = {"hilora": None, **{f"cohorts of {size}": size for size in (1, 4, 16, 64) if size <= shape.clients}}
    steps = {name: federation.epoch(size, dtype) for name, size in sizes.items()}
    rivals = {name: Contestant(step, step, federation.cost, TOLERANCE[dtype]) for name, step in steps.items()}
    return Lineup(rivals, {"": expected}, dtype=dtype, capture=False)


def shapes(scale: str) -> list[Round]:
    if scale == "toy":
        return [Round("test_vit", 160, 3, 4, batch=2)]
    if scale == "cpu":
        return [Round("deit_tiny_patch16_224", 96, 16, 16, batch=8)]
    return [Round("deit_tiny_patch16_224", 224, 64, 64, 32)]


OPERATION = Operation("A local epoch by the size of cohorts", Round, shapes, lineup, place=3)
