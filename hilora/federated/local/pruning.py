"""Training that makes the last ranks of an adapter small, so that a client can do without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.engine.bench import Bench, LocalAlgorithm
from hilora.federated.local.sgd import SGDTraining


@dataclass(frozen=True)
class TailPenalty(LocalAlgorithm):
    """Local SGD on the loss and `weight · Σ_P ‖B[:, γk:k]‖_F ‖A[γk:k]‖_F`, for a client of k ranks.

    Attributes:
        tier: whose ranks.
        decay: γ; the first ⌊γk⌋ ranks, one at least, are not penalised.
        weight: of the penalty.
    """

    tier: str
    decay: float
    weight: float

    def training(self, bench: Bench) -> SGDTraining:
        return _TailTraining(bench, self)


class _TailTraining(SGDTraining):
    def __init__(self, bench: Bench, algorithm: TailPenalty) -> None:
        super().__init__(bench)
        self.algorithm, self.ranks = algorithm, bench.ranks(algorithm.tier)
        values = [one.parameter for one in bench.factors(algorithm.tier, "AB", 0.0)]
        self.pairs = list(zip(values[::2], values[1::2], strict=True))

    def _step(self) -> None:
        task = self._task(self.bench.predict(self.pixels))
        tails = sum(_tail(A, B, self.ranks, self.algorithm.decay).sum(0) for A, B in self.pairs)
        total = (task + self.bench.penalty() + self.algorithm.weight * tails).sum()
        self._update(task, torch.autograd.grad(total, self.trained))


def kept(ranks: Tensor, decay: float) -> Tensor:
    """⌊γk⌋ of so many ranks, one at least."""
    return (ranks.double() * decay).floor().to(ranks.dtype).clamp_min(1)


def tails(table: AdapterTable, decay: float) -> Tensor:
    """`Σ_P ‖B[:, γk:k]‖_F ‖A[γk:k]‖_F` of each adapter, `[S]`."""
    pairs = [(A.transpose(0, 1), B.transpose(0, 1)) for A, B in table.factors]
    return torch.stack([_tail(A, B, table.rank.to(A.device), decay).sum(0) for A, B in pairs]).sum(0)


def _tail(A: Tensor, B: Tensor, ranks: Tensor, decay: float) -> Tensor:
    """Of A `[P, S, r, in]` and B `[P, S, out, r]`: `[P, S]`."""
    place = torch.arange(A.shape[2], device=A.device)
    last = (place >= kept(ranks, decay)[:, None]) & (place < ranks[:, None])  # [S, r]
    tail_A, tail_B = A.where(last[..., None], 0), B.where(last[:, None], 0)
    norm_A, norm_B = (torch.linalg.vector_norm(tail, dim=(-2, -1)) for tail in (tail_A, tail_B))
    product: Tensor = norm_A * norm_B
    return product
