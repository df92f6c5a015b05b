"""What a local epoch costs by the size of cohorts, and by the number of clients that share the same images."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import cost
from benchmarks.contest import Contestant, contest
from benchmarks.federation import Federation
from benchmarks.ledger import Ledger
from benchmarks.shapes import Round
from benchmarks.test_bench_round import BF16, FP32, ours
from benchmarks.timing import DEVICE
from hilora.federated.engine.device import quick_dtype


def test_cohort(benchmark: Any, ledger: Ledger, shape: Round) -> None:
    """Against cohorts of 1, 4, 16 and 64 clients; ours are as large as there is room for."""
    federation = Federation(shape, torch.device(DEVICE))
    dtype = quick_dtype(federation.device, federation.backbone.features)
    expected = [value.double() for value in ours(federation, 1, torch.float32)()]
    sizes = {f"cohorts of {size}": size for size in (1, 4, 16, 64) if size <= shape.clients}
    least, tolerance = _cost(federation), FP32 if dtype == torch.float32 else BF16
    steps = {name: ours(federation, size, dtype) for name, size in {"hilora": None, **sizes}.items()}
    rivals = {name: Contestant(step, step, least, tolerance) for name, step in steps.items()}
    what = {"op": "cohort", "phase": "step", **shape._asdict(), "dtype": str(dtype).removeprefix("torch.")}
    contest(benchmark, ledger, what, rivals, [()], {"": expected}, dtype, capture=False)


def test_population(benchmark: Any, ledger: Ledger, shape: Round) -> None:
    """Against ten and a hundred times as many clients with the same images between them, in cohorts of one size. Each
    client trains its own adapter, so there is no common result; that each is right, other tests say."""
    rivals = {}
    dtype = torch.float32
    for more in (1, 10, 100):
        if shape.images < more * shape.batch:
            continue
        part = shape._replace(clients=more * shape.clients, images=shape.images // more)
        federation = Federation(part, torch.device(DEVICE))
        dtype = quick_dtype(federation.device, federation.backbone.features)
        step = ours(federation, shape.clients, dtype)
        rivals["hilora" if more == 1 else f"{part.clients} clients"] = Contestant(
            step, lambda: [], _cost(federation), 0.0
        )
    what = {"op": "population", "phase": "step", **shape._asdict(), "dtype": str(dtype).removeprefix("torch.")}
    contest(benchmark, ledger, what, rivals, [()], {"": []}, dtype, capture=False)


def _cost(federation: Federation) -> cost.Cost:
    return cost.local_epoch(federation.shape, federation.tokens, federation.backbone.features, federation.depth)
