"""The local epoch of clients of three budgets, beside that of clients who all have the largest.

A third of the clients each have all ranks, half of them, and a quarter; or train all blocks, three quarters, and half;
or have no others. All are computed at the width of the widest, so that a round should cost no more than one of equal
clients: ranks that a client lacks are zeros, blocks that it lacks are computed and passed by. Each case must come to
what its clients come to one by one.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.contest import Contestant, Lineup
from benchmarks.federation import TOLERANCE, Federation, Round
from benchmarks.operations import Operation
from benchmarks.timing import DEVICE
from hilora.federated.client import Models
from hilora.federated.engine.blocks import Parts
from hilora.federated.protocol import fitted


def lineup(shape: Round, phase: str, scale: str) -> Lineup:
    federation = Federation(shape, torch.device(DEVICE))
    dtype, some = federation.quick, blocks(shape.clients, federation.depth)
    cases: dict[str, tuple[Models | None, Parts | None]] = {
        "hilora": (unequal(federation.models), None),
        "equal ranks": (None, None),
        "some blocks trained": (None, Parts(some)),
        "some blocks alone": (None, Parts.having(some)),
    }
    truth = {
        name: [value.double() for value in federation.epoch(1, torch.float32, *case)()] for name, case in cases.items()
    }
    rivals = {}
    for name, case in cases.items():
        step = federation.epoch(None, dtype, *case)
        rivals[name] = Contestant(step, step, federation.cost, TOLERANCE[dtype])
    return Lineup(rivals, truth, dtype=dtype, capture=False)


def unequal(models: Models) -> Models:
    """The models of clients with all, half and a quarter of the ranks, in turn."""
    budget = torch.arange(len(models.head.slot)) % 3
    tiers = {tier: fitted(rows, (rows.table.r // 2**budget).clamp_min(1)) for tier, rows in models.tiers.items()}
    return replace(models, tiers=tiers)


def blocks(clients: int, depth: int) -> torch.Tensor:
    """All, three quarters and half of the blocks, in turn, from a place of each client's own: bool `[n, L]`."""
    client = torch.arange(clients)
    count = depth - client % 3 * depth // 4
    return (torch.arange(depth) + client[:, None]) % depth < count[:, None]


def shapes(scale: str) -> list[Round]:
    if scale == "toy":
        return [Round("test_vit", 160, 3, 4, batch=2)]
    if scale == "cpu":
        return [Round("deit_tiny_patch16_224", 96, 20, 32)]
    return [Round("deit_tiny_patch16_224", 224, 20, 64, 32)]


OPERATION = Operation("A local epoch of unequal clients", Round, shapes, lineup, place=3)
